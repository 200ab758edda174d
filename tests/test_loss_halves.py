"""The halves of the loss beside the loss, which stays what it was to the last bit."""

import torch

from dreambooth.loss import prior_preserving_loss


def reference(prediction, target, weight, weights=None):
    """Ruiz et al. 2022, eq. 2, without the halves."""
    error = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))
    if weights is not None:
        error = error * weights
    instance, class_ = error.chunk(2)
    return instance.mean() + weight * class_.mean()


def test_loss_and_gradients_are_the_same_to_the_last_bit():
    generator = torch.Generator().manual_seed(0)
    for weight in (0, 0.3, 1.0, 2.5):
        for weights in (None, torch.rand(6, generator=generator)):
            prediction = torch.randn(6, 4, 8, 8, generator=generator).requires_grad_()
            target = torch.randn(6, 4, 8, 8, generator=generator)
            expected = reference(prediction, target, weight, weights)
            (expected_gradient,) = torch.autograd.grad(expected, prediction)
            loss, _ = prior_preserving_loss(prediction, target, weight, weights)
            (gradient,) = torch.autograd.grad(loss, prediction)
            assert torch.equal(loss, expected)
            assert torch.equal(gradient, expected_gradient)


def test_halves_are_those_before_weighting_and_carry_no_gradients():
    """Squared errors 1, 4 | 9, 25 of one pair: means 2.5 and 17, whatever the weight."""
    prediction = torch.tensor([[1.0, 2.0], [3.0, 5.0]]).view(2, 1, 1, 2).requires_grad_()
    for weight in (0, 1, 3):
        loss, halves = prior_preserving_loss(prediction, torch.zeros(2, 1, 1, 2), weight)
        assert halves.tolist() == [2.5, 17.0]
        assert loss.item() == 2.5 + weight * 17
        assert not halves.requires_grad
