"""Seeds: each follows from what it is used for, never from earlier random numbers."""

import zlib

import numpy as np


def seed_for(stream, *numbers):
    """A 63 bit seed for one use of random numbers: the name of its stream, such as "noise", and the
    numbers that tell its uses apart, such as the run's seed and a position.

    Equal arguments give equal seeds, different ones unrelated seeds: streams share none but by
    chance (torch's generator on the CPU uses the low 32 bits of a seed), and trailing zeros count.
    """
    entropy = (zlib.crc32(stream.encode()), len(numbers), *numbers)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
