"""Seeds: equal for equal arguments, unrelated for others."""

from itertools import product

from dreambooth.seeds import seed_for

STREAMS = ("noise", "timesteps", "image")


def test_seeds_are_equal_for_equal_arguments_only():
    uses = list(product(STREAMS, range(8), range(50), range(2)))
    seeds = {use: seed_for(*use) for use in uses}
    assert len(set(seeds.values())) == len(uses)
    for use, seed in seeds.items():
        assert seed_for(*use) == seed
        assert 0 <= seed < 2**63


def test_the_order_of_the_numbers_counts():
    assert seed_for("noise", 0, 1) != seed_for("noise", 1, 0)


def test_trailing_zeros_count():
    """numpy's SeedSequence alone takes (5,) and (5, 0) for the same."""
    assert len({seed_for("noise"), seed_for("noise", 0), seed_for("noise", 0, 0)}) == 3
    assert seed_for("noise", 5) != seed_for("noise", 5, 0)
