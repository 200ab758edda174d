"""Images to latents, once; noise and timesteps that follow from a pair's position alone."""

from types import SimpleNamespace

import pytest
import torch

from dreambooth import latents
from dreambooth.families import StableDiffusion
from dreambooth.images import crop_image
from dreambooth.loss import sample_posterior
from dreambooth.schedules import DiffusionSchedule, FlowSchedule

SHAPE = (4, 8, 8)  # of one image's latents


def test_each_image_has_noise_of_its_own():
    """256 numbers for each of 64 images and both kinds of noise: all unrelated."""
    noise = torch.cat(latents.sample_noise(0, range(32), SHAPE, "cpu"))
    assert noise.shape == (128, *SHAPE)
    correlations = torch.corrcoef(noise.flatten(1)) - torch.eye(128)
    assert correlations.abs().max() < 0.4
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.02)


def test_noise_is_drawn_on_the_cpu_for_every_device(monkeypatch):
    """A run that is resumed on another kind of device goes on with its own noise."""
    original, drawn_on = torch.randn, []

    def randn(*args, generator, **kwargs):
        drawn_on.append(generator.device.type)
        return original(*args, generator=generator, **kwargs)

    monkeypatch.setattr(torch, "randn", randn)
    noise = latents.sample_noise(0, range(3), SHAPE, "meta")
    assert drawn_on == ["cpu"] * 3
    assert [(n.device.type, n.shape) for n in noise] == [("meta", (6, *SHAPE))] * 2


def test_noise_and_timesteps_of_a_pair_follow_from_seed_and_position_alone():
    """However pairs are dealt to workers and batches; and whatever version of these scripts resumes
    a run."""
    every = latents.sample_noise(3, range(32), SHAPE, "cpu")
    some = latents.sample_noise(3, [5, 2, 30], SHAPE, "cpu")
    rows = [5, 2, 30, 32 + 5, 32 + 2, 32 + 30]  # instance half first
    for kind in range(2):
        assert torch.equal(some[kind], every[kind][rows])
    firsts = [noise[0, 0, 0, 0].item() for noise in some]
    assert firsts == pytest.approx([-2.25276, -1.22667], abs=1e-5)
    _, other = latents.sample_noise(4, range(32), SHAPE, "cpu")
    assert (every[1].flatten(1) * other.flatten(1)).mean(1).abs().max() < 0.3

    every = (latents.sample_fractions(3, range(32)) * 1000).long()
    assert torch.equal((latents.sample_fractions(3, [5, 2, 30]) * 1000).long(), every[rows])
    assert every[[5, 6, 32 + 5, 32 + 6]].tolist() == [695, 313, 693, 311]
    assert (every != (latents.sample_fractions(4, range(32)) * 1000).long()).sum() > 55


@pytest.mark.parametrize("seed", range(3))
def test_timesteps_of_consecutive_pairs_are_spread_evenly(seed):
    """High and low noise in every step: any eight consecutive pairs have one or more timesteps in
    each quarter, and of a whole run each tenth of the timesteps gets its tenth. (Independent ones
    would miss a quarter in about every third step.)"""
    timesteps = (latents.sample_fractions(seed, range(1000)) * 1000).long()
    assert timesteps.dtype == torch.long
    halves = timesteps.view(2, 1000)
    quarters = halves.unfold(1, 8, 1) // 250  # (2, 993, 8)
    for quarter in range(4):
        assert (quarters == quarter).any(2).all()
    for half in halves:
        counts = torch.bincount(half // 100)
        assert len(counts) == 10
        assert (counts - 100).abs().max() <= 2


def test_photos_may_be_kept_from_the_most_noise():
    """And the class half never: it is trained at all timesteps, as without the flag. A flow's
    sigmas are shares of noise already."""
    every = DiffusionSchedule()  # 1000 timesteps
    whole = latents.sample_timesteps(every, 3, range(500))
    part = latents.sample_timesteps(every, 3, range(500), max_instance_noise=0.75)
    assert whole.dtype == part.dtype == torch.long
    assert torch.equal(whole[500:], part[500:])
    assert (part[:500] - 0.75 * whole[:500]).abs().max() <= 1
    assert 740 <= part[:500].max() < 750 < 990 <= whole[:500].max()
    sigmas = latents.sample_timesteps(FlowSchedule(shift=3.0), 3, range(500))
    part = latents.sample_timesteps(FlowSchedule(shift=3.0), 3, range(500), 0.5)
    assert torch.equal(sigmas[500:], part[500:])
    assert part[:500].max() == pytest.approx(3 * 0.5 / (1 + 2 * 0.5), abs=0.01)


def test_each_timestep_has_an_equal_part_of_the_schedule():
    """The last one as well: what is just below 1 does not become the timestep behind it."""
    fractions = torch.tensor([0, 0.0009, 0.001, 0.4999, 0.9999], dtype=torch.float64)
    assert DiffusionSchedule().timesteps_at(fractions, 1.0).tolist() == [0, 0, 1, 499, 999]
    assert DiffusionSchedule().timesteps_at(fractions, 0.5).tolist() == [0, 0, 0, 249, 499]


def test_over_seeds_a_timestep_is_uniform():
    """Mean 499.5, standard deviation 288.7; and the two halves start independently."""
    first = torch.stack(
        [(latents.sample_fractions(seed, [7]) * 1000).long() for seed in range(500)]
    )
    first = first.double()  # (500, 2)
    assert (first.mean(0) - 499.5).abs().max() < 4 * 288.7 / 500**0.5
    assert (first.std(0) - 288.7).abs().max() < 30
    assert torch.corrcoef(first.T)[0, 1].abs() < 0.2


@pytest.fixture
def vae(load_models):
    vae, _, _ = load_models()
    return vae


def random_images(count):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 64, 64, generator=generator).clamp(-1, 1)


@pytest.fixture
def pass_sizes(vae):
    """The number of images in each forward pass of the VAE so far."""
    sizes = []
    vae.encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    return sizes


def test_a_posterior_does_not_depend_on_the_images_beside_it(vae, pass_sizes):
    """Not in its last bit: on a CPU the VAE takes one image per pass."""
    images = random_images(3)
    together = latents.encode(vae, images, StableDiffusion())
    assert pass_sizes == [1, 1, 1]
    for i in range(3):
        assert torch.equal(
            latents.encode(vae, images[i : i + 1], StableDiffusion()), together[i : i + 1]
        )


def test_each_crop_is_encoded_once_when_a_step_asks_for_it(vae, pass_sizes):
    """Fault 8 of the published example: the VAE ran again for every image in every epoch. Here, six
    batches of two pairs are made of five images, with the same result; and the first step waits
    for its own images alone."""
    pool = random_images(5)
    numbers = [[(n * 4 + i * (n + 1)) % 5 for i in range(4)] for n in range(6)]
    read = []

    def batches():
        for own in numbers:
            read.append(own)
            yield {"images": pool[own], "keys": [f"image{i}" for i in own], "positions": own[:2]}

    family = SimpleNamespace(
        scale=StableDiffusion().scale,
        vae_in_float16=lambda vae: True,
        conditions=lambda prompts, batch: (prompts, batch["keys"]),
    )
    encoded = latents.encode_batches(vae, batches(), family, "prompts", torch.device("cpu"))
    assert read == []
    expected = [latents.encode(vae, image[None], StableDiffusion())[0] for image in pool]
    pass_sizes.clear()
    for own in numbers:
        batch = next(encoded)
        assert read[-1] == own
        assert sum(pass_sizes) == len({i for numbers in read for i in numbers})
        assert batch["positions"] == own[:2]
        assert torch.equal(batch["posteriors"], torch.stack([expected[i] for i in own]))
    assert sum(pass_sizes) == 5


def test_the_posterior_is_the_one_that_diffusers_samples_from(vae):
    """Mean and standard deviation, scaled; a sample is mean + standard deviation * noise."""
    vae.register_to_config(scaling_factor=0.5)
    images = random_images(4)
    posteriors = latents.encode(vae, images, StableDiffusion())
    assert posteriors.shape == (4, 2, 4, 16, 16)
    assert posteriors.dtype == torch.float32
    assert not posteriors.requires_grad
    with torch.no_grad():
        distribution = vae.encode(images).latent_dist
    expected = 0.5 * distribution.sample(torch.Generator().manual_seed(0))
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    found = sample_posterior(posteriors, noise)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_float16_changes_a_posterior_by_less_than_a_hundredth_of_its_own_noise(vae, root):
    """In which the VAE runs on GPUs. bfloat16 has a tenth of its precision."""
    photos = (root / "images" / "lego-car").glob("*.jpg")
    images = torch.stack([torch.tensor(crop_image(path, 64, 0)[0]) for path in photos])
    images = images / 127.5 - 1
    expected = latents.encode(vae, images, StableDiffusion(), in_float16=False)
    found = latents.encode(vae, images, StableDiffusion(), in_float16=True)
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    noise = expected[:, 1].mean()
    assert (found - expected).square().mean().sqrt() < 0.01 * noise


def test_what_float16_cannot_hold_is_encoded_in_float32(vae):
    """Activations above 65504, where float16 would give not a number."""
    with torch.no_grad():
        vae.encoder.conv_in.weight *= 1e6
    images = random_images(2)
    found = latents.encode(vae, images, StableDiffusion(), in_float16=True)
    assert torch.equal(found, latents.encode(vae, images, StableDiffusion(), in_float16=False))
    assert found.isfinite().all()


def test_pairs_late_in_a_long_run_are_spread_as_evenly():
    """In float32, the millionth pair's place in the schedule would be one of sixteen."""
    fractions = latents.sample_fractions(0, range(10**6, 10**6 + 1000)).view(2, 1000)
    steps = fractions.diff(dim=1) % 1
    assert (steps - latents.INVERSE_GOLDEN_RATIO).abs().max() < 1e-6
