"""Seeds: equal for equal arguments, unrelated for others."""

from itertools import product

from dreambooth.seeds import seed_for


def test_seeds_are_equal_for_equal_arguments_only():
    """The order of the numbers counts, and so do trailing zeros: numpy's SeedSequence alone takes
    (5,) and (5, 0) for the same."""
    uses = list(product(("noise", "timesteps", "image"), range(8), range(50), range(2)))
    uses += [("noise",), ("noise", 0), ("noise", 0, 0), ("noise", 5), ("noise", 5, 0)]
    seeds = {use: seed_for(*use) for use in uses}
    assert len(set(seeds.values())) == len(uses)
    for use, seed in seeds.items():
        assert seed_for(*use) == seed
        assert 0 <= seed < 2**63
