"""Where random numbers come from: each from what it belongs to, never from earlier ones."""

import numpy as np


def seed_for(*numbers):
    """A 63 bit seed for, say, (run's seed, step, rank). Equal numbers give equal seeds; different
    ones give unrelated seeds, but zeros at the end do not count: (5,) and (5, 0) are equal."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
