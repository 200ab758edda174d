"""The loss and its target, against values worked out by hand and against diffusers."""

import pytest
import torch
from diffusers import DDPMScheduler

from dreambooth import latents
from dreambooth.loss import get_target, min_snr_weights, prior_preserving_loss, training_loss


def rows(*values):
    """Latents of one channel, (2B, 1, 1, w), one for each list of values."""
    return torch.tensor(values, dtype=torch.float32).view(len(values), 1, 1, -1)


# Squared errors (1, 4) of the instance and (9, 25) of the class: means 2.5 and 17.
PREDICTION = rows([1, 2], [3, 5])
ZERO = torch.zeros(2, 1, 1, 2)


@pytest.mark.parametrize("weight", [0.5, 1, 3])
def test_weight_scales_the_class_half_alone(weight):
    """The gradient of p is 2 p / n, times the weight in the class half. The halves are returned
    before weighting, and carry no gradient."""
    prediction = PREDICTION.clone().requires_grad_()
    loss, halves = prior_preserving_loss(prediction, ZERO, weight)
    assert loss.item() == 2.5 + weight * 17
    assert halves.tolist() == [2.5, 17]
    assert not halves.requires_grad
    loss.backward()
    assert prediction.grad.flatten().tolist() == [1, 2, weight * 3, weight * 5]


def test_halves_and_targets_are_not_mixed():
    """Errors 1, 3 | 5, 7: (1 + 9) / 2 and (25 + 49) / 2. Alternating rows would give other means,
    and so would swapped targets."""
    prediction = rows([1], [3], [5], [7])
    _, halves = prior_preserving_loss(prediction, torch.zeros_like(prediction), 1)
    assert halves.tolist() == [5, 37]
    _, halves = prior_preserving_loss(prediction, prediction.clone(), 1)
    assert halves.tolist() == [0, 0]


def test_weights_scale_each_image_alone():
    """Mean squared errors 2.5 and 17, times 2 and 3."""
    _, halves = prior_preserving_loss(PREDICTION, ZERO, 1, torch.tensor([2.0, 3.0]))
    assert halves.tolist() == [5, 51]


def test_without_a_class_half_the_loss_is_the_mean_of_all_images():
    """Of errors 2.5 and 17; with weights, of 5 and 51."""
    for weights, expected in ((None, 9.75), (torch.tensor([2.0, 3.0]), 28)):
        prediction = PREDICTION.clone().requires_grad_()
        loss, alone = prior_preserving_loss(prediction, ZERO, 0, weights)
        assert loss.item() == expected
        assert alone.tolist() == [expected]
        assert loss.requires_grad
        assert not alone.requires_grad


def test_bfloat16_predictions_are_compared_in_float32():
    """1.0078125 is a bfloat16 number, its square is not."""
    prediction = torch.full((2, 1, 8, 8), 1.0078125, dtype=torch.bfloat16)
    for pair in ((prediction, 0 * prediction), (0 * prediction, prediction)):
        loss, _ = prior_preserving_loss(*pair, 1)
        assert loss.dtype == torch.float32
        assert loss.item() == 2 * 1.0078125**2


@pytest.fixture
def scheduler():
    """Stable Diffusion's noise schedule."""
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def test_targets_agree_with_diffusers_and_lead_back_to_the_latents(scheduler):
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 4, 4, 8, 8)
    timesteps = torch.tensor([0, 1, 500, 999])
    target = get_target("v_prediction", clean, noise, timesteps, scheduler.alphas_cumprod)
    velocity = scheduler.get_velocity(clean, noise, timesteps)
    torch.testing.assert_close(target, velocity, rtol=0, atol=1e-6)
    a = scheduler.alphas_cumprod[timesteps].view(4, 1, 1, 1)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    found = a.sqrt() * noisy - (1 - a).sqrt() * target
    torch.testing.assert_close(found, clean, rtol=0, atol=1e-5)

    target = get_target("epsilon", clean, noise, timesteps, scheduler.alphas_cumprod)
    assert torch.equal(target, noise)


def test_other_prediction_types_are_refused_by_name(scheduler):
    clean = torch.zeros(2, 1, 1, 1)
    timesteps = torch.tensor([0, 0])
    with pytest.raises(ValueError, match="'sample': must be epsilon, v_prediction or flow"):
        get_target("sample", clean, clean, timesteps, scheduler.alphas_cumprod)
    with pytest.raises(ValueError, match="'sample': must be epsilon or v_prediction"):
        min_snr_weights("sample", timesteps, scheduler.alphas_cumprod, 5.0)


def test_min_snr_weights_by_hand():
    """Cumulative alphas 0.9, 0.5, 0.1 and 0 are signal-to-noise ratios 9, 1, 1/9 and 0; gamma 5
    limits the first to 5."""
    alphas_cumprod = torch.tensor([0.9, 0.5, 0.1, 0.0])
    timesteps = torch.tensor([0, 1, 2, 3, 0])
    epsilon = min_snr_weights("epsilon", timesteps, alphas_cumprod, 5.0)
    torch.testing.assert_close(epsilon, torch.tensor([5 / 9, 1, 1, 1, 5 / 9]))
    v = min_snr_weights("v_prediction", timesteps, alphas_cumprod, 5.0)
    torch.testing.assert_close(v, torch.tensor([5 / 10, 1 / 2, (1 / 9) / (10 / 9), 0, 5 / 10]))


def test_noise_schedule_is_exact_where_bfloat16_is_not(load_models):
    """Fault 5 of the published example: in bfloat16 the cumulative alpha of timesteps 0 and 1
    rounds to 1, so that no noise at all is added there, and dozens of timesteps are more than 1 %
    off."""
    _, _, scheduler = load_models()
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    sigma = (1 - torch.cumprod(1 - beta, 0)).sqrt()
    ours = (1 - scheduler.alphas_cumprod).sqrt().double()
    assert ((ours - sigma) / sigma).abs().max() < 1e-4
    coarse = (1 - scheduler.alphas_cumprod.bfloat16()).sqrt().double()
    assert (coarse[:2] == 0).all()
    assert (((coarse - sigma) / sigma).abs() > 0.01).sum() > 40


class Spy:
    """A stand-in for the denoiser: it keeps its inputs and predicts zero."""

    def __call__(self, *inputs):
        self.noisy_latents, self.timesteps, self.conditions = inputs
        return torch.zeros_like(self.noisy_latents)


@pytest.mark.parametrize(
    ("prediction_type", "snr_gamma"), [("epsilon", None), ("epsilon", 5.0), ("v_prediction", 5.0)]
)
def test_a_step_by_hand(scheduler, prediction_type, snr_gamma):
    """Each image's latents are sampled from its posterior and get noise according to its timestep,
    in float32; the denoiser gets each image's timestep and both prompts; and the loss is of what
    the model predicts. Of 32 pairs, one is at timestep 0."""
    scheduler.register_to_config(prediction_type=prediction_type)
    posteriors = torch.randn(64, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    posterior_noise, noise = latents.sample_noise(0, range(32), (4, 8, 8), "cpu")
    timesteps = (latents.sample_fractions(0, range(32)) * 1000).long()
    timesteps[0] = 0
    conditions = {"input_ids": torch.arange(6).view(2, 3)}
    spy = Spy()
    loss, halves = training_loss(
        spy, scheduler, posteriors, conditions, posterior_noise, noise, timesteps, 0.25, snr_gamma
    )
    assert torch.equal(spy.timesteps, timesteps)
    assert spy.conditions is conditions

    clean = (posteriors[:, 0] + posteriors[:, 1] * posterior_noise).double()
    a = scheduler.alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)
    noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
    assert spy.noisy_latents.dtype == torch.float32
    torch.testing.assert_close(spy.noisy_latents.double(), noisy, rtol=1e-6, atol=1e-6)
    target = noise.double()
    if prediction_type == "v_prediction":
        target = a.sqrt() * noise - (1 - a).sqrt() * clean
    errors = target.square().mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        snr = (a / (1 - a)).flatten()
        errors *= snr.clamp(max=snr_gamma) / (snr if prediction_type == "epsilon" else snr + 1)
    expected = errors.view(2, 32).mean(1)
    torch.testing.assert_close(halves.double(), expected, rtol=1e-5, atol=0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((expected[0] + 0.25 * expected[1]).item(), rel=1e-5)
