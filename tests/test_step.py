"""The training step on latents of noise, the random draws, and images that are encoded once."""

import math
from types import SimpleNamespace

import pytest
import torch

import train
from dreambooth import latents
from dreambooth.checks import UserError
from dreambooth.loss import get_target, min_snr_weights, prior_preserving_loss, training_loss
from dreambooth.report import Report


class Spy:
    """A stand-in for the denoiser that keeps what it is asked, and answers zero."""

    def __call__(self, noisy, timesteps, prompt_ids):
        self.noisy, self.timesteps, self.prompt_ids = noisy, timesteps, prompt_ids
        return torch.zeros_like(noisy)


@pytest.fixture
def scheduler(load_models):
    return load_models()[2]


@pytest.fixture
def batch():
    """Posteriors of 64 images, 32 pairs."""
    posteriors = torch.randn(64, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    posteriors[:, 1] = posteriors[:, 1].abs() * 0.1
    return {"posteriors": posteriors, "prompt_ids": torch.arange(6).view(2, 3), "positions": list(range(32))}


def step(scheduler, batch, **kwargs):
    """One loss, what the denoiser was asked, the draws, and the latents in double precision."""
    spy, draws = Spy(), latents.draw(0, batch, 1000)
    loss = training_loss(spy, scheduler, batch, draws, **{"prior_loss_weight": 1.0, **kwargs})
    x = batch["posteriors"][:, 0] + batch["posteriors"][:, 1] * draws["posterior_noise"]
    return loss, spy, draws, x


def test_noise_schedule_is_evaluated_in_float32(scheduler, batch):
    """Fault 5 of the original: in bfloat16 the cumulated alpha of timesteps 0 and 1 rounds to 1, so
    that no noise at all is added there, and dozens of timesteps are more than 1 % off."""
    _, spy, draws, x = step(scheduler, batch)
    assert spy.noisy.dtype == torch.float32
    a = scheduler.alphas_cumprod.double()[draws["timesteps"]].view(-1, 1, 1, 1)
    exact = a.sqrt() * x.double() + (1 - a).sqrt() * draws["noise"].double()
    torch.testing.assert_close(spy.noisy.double(), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(spy.noisy.double(), exact, rtol=1e-6, atol=1e-6)

    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    sigma = (1 - torch.cumprod(1 - beta, 0)).sqrt()
    ours = (1 - scheduler.alphas_cumprod).sqrt().double()
    assert ((ours - sigma) / sigma).abs().max() < 1e-4
    coarse = (1 - scheduler.alphas_cumprod.bfloat16()).sqrt().double()
    assert (coarse[:2] == 0).all()
    assert (((coarse - sigma) / sigma).abs() > 0.01).sum() > 40

    draws["timesteps"][:] = 0
    training_loss(spy, scheduler, batch, draws, 1.0)
    assert (spy.noisy - x).std() > 0.02  # sqrt(0.00085) is 0.029


def test_step_weighs_its_halves_in_float32(scheduler, batch):
    loss, spy, draws, _ = step(scheduler, batch, prior_loss_weight=0.25)
    assert torch.equal(spy.prompt_ids, batch["prompt_ids"])
    assert loss.dtype == torch.float32
    first, second = draws["noise"].square().chunk(2)
    assert loss.item() == pytest.approx((first.mean() + 0.25 * second.mean()).item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_step_aims_at_what_the_model_predicts(scheduler, batch, kind, gamma):
    scheduler.register_to_config(prediction_type=kind)
    loss, _, draws, x = step(scheduler, batch, snr_gamma=gamma)
    target = get_target(kind, x, draws["noise"], draws["timesteps"], scheduler.alphas_cumprod)
    weights = None if gamma is None else min_snr_weights(kind, draws["timesteps"], scheduler.alphas_cumprod, gamma)
    expected = prior_preserving_loss(torch.zeros_like(target), target, 1, weights)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_each_image_has_its_own_timestep_and_noise(batch):
    draws = latents.draw(0, batch, 1000)
    assert len(set(draws["timesteps"].tolist())) > 50
    assert draws["timesteps"].min() >= 0
    assert 900 < draws["timesteps"].max() < 1000
    every = torch.cat([draws["noise"], draws["posterior_noise"]]).flatten(1)
    assert (torch.corrcoef(every) - torch.eye(128)).abs().max() < 0.4  # 256 numbers each, all unrelated
    assert every.std().item() == pytest.approx(1, abs=0.02)


def test_draws_of_a_pair_follow_from_seed_and_position_alone(batch):
    """However pairs are dealt to workers and batches; of other seeds' and positions' they say nothing."""
    whole = latents.draw(3, batch, 1000)
    some = [5, 2, 30]
    rows = some + [32 + i for i in some]  # instance half first
    part = latents.draw(3, {"posteriors": batch["posteriors"][rows], "positions": some}, 1000)
    for name, value in part.items():
        assert torch.equal(value, whole[name][rows]), name
    other = latents.draw(4, batch, 1000)
    assert (other["timesteps"] != whole["timesteps"]).sum() > 55
    assert not torch.isclose(other["noise"], whole["noise"], atol=1e-4).any(0).all()


def test_timesteps_of_pairs_in_a_row_are_spread_evenly():
    """High and low noise in every step: of any eight pairs in a row each half has two or more in the upper
    and in the lower half of the timesteps and one or more in each quarter (independent draws miss a quarter
    in every other step), and over a whole run each tenth gets its tenth. Over seeds a timestep is uniform."""
    for seed in range(3):
        timesteps = latents.spread(seed, range(1000), 1000).view(2, 1000)  # instance half, class half
        quarters = timesteps.unfold(1, 8, 1) // 250  # (2, 993, 8)
        for quarter in range(4):
            assert (quarters == quarter).any(2).all()
        for half in timesteps:
            assert all(abs(count - 100) <= 2 for count in torch.bincount(half // 100, minlength=10).tolist())
    chance = torch.randint(4, (2, 993, 8), generator=torch.Generator().manual_seed(0))
    assert not all((chance == quarter).any(2).all() for quarter in range(4))
    first = torch.stack([latents.spread(seed, [7], 1000) for seed in range(500)]).double()
    assert (first.mean(0) - 499.5).abs().max() < 4 * 288.7 / 500**0.5
    assert (first.std(0) - 288.7).abs().max() < 30
    assert torch.corrcoef(first.T)[0, 1].abs() < 0.2  # the halves have starts of their own


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_accumulated_gradients_are_those_of_the_larger_batch(load_models, snr_gamma):
    """One pair in each of four passes, or four pairs in one: equal to float32 rounding, as the forward pass
    is in float32 on a CPU. Of the four passes alone, each has another gradient."""
    generator = torch.Generator().manual_seed(0)
    posteriors = torch.randn(8, 2, 4, 16, 16, generator=generator).abs()
    prompt_ids = torch.randint(0, 500, (2, 48), generator=generator)

    def gradients(sizes):
        _, denoiser, scheduler = load_models()
        starts = [sum(sizes[:n]) for n in range(len(sizes))]
        pairs = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
        rows = [own + [4 + i for i in own] for own in pairs]  # instance half first
        batches = (
            {"posteriors": posteriors[r], "prompt_ids": prompt_ids, "positions": own}
            for r, own in zip(rows, pairs, strict=True)
        )
        settings = {"seed": 3, "prior_loss_weight": 0.7, "snr_gamma": snr_gamma}
        args = SimpleNamespace(gradient_accumulation_steps=len(sizes), **settings)
        loss = train.forward_backward(denoiser, scheduler, batches, args)
        return loss, torch.cat([p.grad.flatten() for p in denoiser.parameters() if p.grad is not None])

    (small_loss, small), (large_loss, large), (_, first) = gradients([1] * 4), gradients([4]), gradients([1])
    torch.testing.assert_close(small_loss, large_loss, rtol=1e-6, atol=0)
    assert (small - large).norm() < 1e-5 * large.norm()
    assert (first - large).norm() > 0.1 * large.norm()


def image_batches():
    """Six batches of two pairs from five images; a key stands for an image."""
    pool = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    for number in range(6):
        which = [(number * 4 + i * (number + 1)) % 5 for i in range(4)]
        yield {"images": pool[which], "keys": [f"image{i}" for i in which], "positions": [number]}


class CountingVae:
    """The VAE, counting the images that it encodes."""

    def __init__(self, vae):
        self.vae, self.config, self.count = vae, vae.config, 0

    def encode(self, images):
        self.count += len(images)
        return self.vae.encode(images)

    def to(self, device):
        return self


def test_each_crop_is_encoded_once_with_the_same_result(load_models):
    """Fault 8 of the original: the VAE ran again for every image at every epoch."""
    vae = load_models()[0]
    cached, live = CountingVae(vae), CountingVae(vae)
    ids = torch.arange(6).view(2, 3)
    found = list(latents.encode_batches(cached, image_batches(), ids, torch.device("cpu")))
    expected = list(latents.encode_batches(live, image_batches(), ids, torch.device("cpu"), live=True))
    assert (cached.count, live.count) == (5, 24)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one["posteriors"], other["posteriors"], rtol=0, atol=1e-4)
        assert one["prompt_ids"] is other["prompt_ids"] is ids
        assert one["positions"] == other["positions"]


def test_posterior_is_the_one_that_diffusers_samples_from(load_models):
    """Mean and standard deviation, scaled; a sample with given noise is mean + std * noise."""
    vae = load_models()[0]
    vae.register_to_config(scaling_factor=0.5)
    images = next(image_batches())["images"]
    posteriors = latents.encode(vae, images)
    assert posteriors.shape == (4, 2, 4, 16, 16)
    assert not posteriors.requires_grad
    with torch.no_grad():
        sample = vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(0)) * 0.5
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(latents.sample(posteriors, noise), sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("what", "losses", "last_norm"), [("loss", [1, math.nan, 1, 1], 1), ("gradients", [1] * 4, math.inf)]
)
def test_a_number_that_is_not_finite_stops_the_run_and_names_its_step(train_argv, what, losses, last_norm):
    """At the next line of log, of which there is one every four steps here; also the last step's gradients, which
    no later loss would show."""
    args = train.parse_args(train_argv("out", log_every=4))
    args.steps, args.started = 4, 0
    report = Report(args, enabled=False)
    for number, loss in enumerate(losses[:3]):
        report.step_is_done(number, torch.tensor(float(loss)), torch.tensor(1.0), 1e-3)
    with pytest.raises(UserError, match=rf"the {what} .* at step {2 if what == 'loss' else 4}: lower --lr"):
        report.step_is_done(3, torch.tensor(float(losses[3])), torch.tensor(float(last_norm)), 1e-3)
