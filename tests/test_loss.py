"""The loss and its target, against values worked out by hand and against diffusers."""

import pytest
import torch
from diffusers import DDPMScheduler

from dreambooth.loss import get_target, min_snr_weights, prior_preserving_loss


def batch(*rows):
    """One latent of one channel, (2B, 1, 1, w), for each row."""
    return torch.tensor(rows, dtype=torch.float32).view(len(rows), 1, 1, -1)


# Squared errors (1, 4) of the instance and (9, 25) of the class: means 2.5 and 17.
PREDICTION, TARGET = batch([1, 2], [3, 5]), torch.zeros(2, 1, 1, 2)


@pytest.mark.parametrize(("weight", "expected"), [(0, 2.5), (1, 19.5), (0.5, 11.0), (3, 53.5)])
def test_weight_scales_the_class_half_alone(weight, expected):
    assert prior_preserving_loss(PREDICTION, TARGET, weight).item() == expected


def test_first_half_of_a_larger_batch_is_the_instance():
    """Errors 1, 3 | 5, 7: (1 + 9) / 2 + (25 + 49) / 2. Alternating rows would give another sum for weight 0."""
    prediction = batch([1], [3], [5], [7])
    assert prior_preserving_loss(prediction, torch.zeros_like(prediction), 0).item() == 5
    assert prior_preserving_loss(prediction, torch.zeros_like(prediction), 1).item() == 42


def test_halves_are_not_mixed():
    """Each prediction is compared with its own target: swapped targets cost, equal ones do not."""
    own = batch([1, 2], [3, 5])
    assert prior_preserving_loss(PREDICTION, own, 1).item() == 0
    assert prior_preserving_loss(PREDICTION, own.flip(0), 1).item() == 13  # (4 + 9) / 2 twice


def test_gradient_reaches_both_halves():
    """The derivative is 2 p / n, times the weight in the class half."""
    prediction = PREDICTION.clone().requires_grad_()
    prior_preserving_loss(prediction, TARGET, 0.5).backward()
    assert prediction.grad.flatten().tolist() == [1, 2, 1.5, 2.5]


def test_bfloat16_predictions_are_compared_in_float32():
    """1.0078125 is a bfloat16 number, its square is none."""
    prediction = torch.full((2, 1, 8, 8), 1.0078125, dtype=torch.bfloat16)
    loss = prior_preserving_loss(prediction, torch.zeros_like(prediction), 1)
    assert loss.dtype == torch.float32
    assert loss.item() == 2 * 1.0078125**2


def schedule():
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def test_epsilon_target_is_the_noise():
    latents, noise = torch.randn(2, 2, 4, 4, 4)
    target = get_target("epsilon", latents, noise, torch.tensor([0, 999]), schedule().alphas_cumprod)
    assert torch.equal(target, noise)


def test_v_target_agrees_with_diffusers_and_leads_back_to_the_latents():
    torch.manual_seed(0)
    scheduler, timesteps = schedule(), torch.tensor([0, 1, 500, 999])
    latents, noise = torch.randn(2, 4, 4, 8, 8)
    target = get_target("v_prediction", latents, noise, timesteps, scheduler.alphas_cumprod)
    torch.testing.assert_close(target, scheduler.get_velocity(latents, noise, timesteps), rtol=0, atol=1e-6)
    a = scheduler.alphas_cumprod[timesteps].view(4, 1, 1, 1)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(a.sqrt() * noisy - (1 - a).sqrt() * target, latents, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["sample", "flow_prediction", "v-prediction", ""])
def test_other_targets_are_refused_by_name(kind):
    latents = torch.zeros(2, 1, 1, 1)
    with pytest.raises(ValueError, match="epsilon and v_prediction") as error:
        get_target(kind, latents, latents, torch.tensor([0, 0]), schedule().alphas_cumprod)
    assert repr(kind) in str(error.value)


def test_weights_scale_each_image_alone():
    """Mean squared errors 2.5 and 17, times 2 and 3."""
    assert prior_preserving_loss(PREDICTION, TARGET, 1, torch.tensor([2.0, 3.0])).item() == 5 + 51
    assert prior_preserving_loss(PREDICTION, TARGET, 1, torch.ones(2)).item() == 19.5


def test_min_snr_weights_by_hand():
    """Cumulated alphas 0.9, 0.5 and 0.1 are signal to noise ratios 9, 1 and 1/9; with gamma 5 the
    first is cut to 5."""
    alphas, timesteps = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0, 1, 2, 0])
    epsilon = min_snr_weights("epsilon", timesteps, alphas, 5.0)
    torch.testing.assert_close(epsilon, torch.tensor([5 / 9, 1, 1, 5 / 9]))
    v = min_snr_weights("v_prediction", timesteps, alphas, 5.0)
    torch.testing.assert_close(v, torch.tensor([5 / 10, 1 / 2, (1 / 9) / (10 / 9), 5 / 10]))
    with pytest.raises(ValueError, match="sample"):
        min_snr_weights("sample", timesteps, alphas, 5.0)
