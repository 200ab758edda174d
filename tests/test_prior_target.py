"""The original model as the teacher of the class half: what it predicts is what the tuned model
should go on predicting."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

import train
from dreambooth import latents, models
from dreambooth.loss import training_loss

CPU = torch.device("cpu")
BATCH = {"keys": ["i", "j", "c", "d"], "prompt_numbers": [0, 0, 1, 2]}  # instance half first


@pytest.fixture
def make(train_args, load_models):
    """A denoiser, its original and one batch: make(use_lora=True)."""

    def build(autocast=None, **flags):
        args = train_args("out", prior_target="original", **flags)
        vae, denoiser, scheduler = load_models(autocast=autocast, prior_target="original", **flags)
        original = models.load_original(args, denoiser, CPU)
        images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
        batch = {**BATCH, "images": images, "sizes": torch.zeros(4, 4), "positions": [5, 6]}
        prompts = {"input_ids": torch.arange(144).view(3, 48) % 61}

        def batches():
            return latents.encode_batches(vae, [batch], denoiser.family, prompts, CPU, original)

        return SimpleNamespace(
            args=args, denoiser=denoiser, scheduler=scheduler, original=original, batches=batches
        )

    return build


def gradients(made, weight):
    """Losses and gradient of a step with this weight of the class loss."""
    args = SimpleNamespace(seed=3, prior_loss_weight=weight, snr_gamma=None, max_instance_noise=1.0)
    made.denoiser.zero_grad()
    losses = train.forward_backward(made.denoiser, made.scheduler, made.batches(), 1, args)
    found = [p.grad.flatten() for p in made.denoiser.parameters() if p.requires_grad]
    return losses, torch.cat(found)


def disturb(denoiser, scale=0.05):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in denoiser.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("flags", [{}, {"use_lora": True}, {"autocast": True}])
def test_before_the_first_step_there_is_nothing_to_correct(make, flags):
    """Neither a class loss nor a gradient of it: to float32's rounding, as the batch of the class
    half alone is smaller. As on a GPU, too: both models are rounded to bfloat16 in the same way."""
    made = make(**flags)
    (_, instance_loss, class_loss), gradient = gradients(made, 1.0)
    _, heavier = gradients(made, 1000.0)
    assert class_loss < 1e-10 < instance_loss
    assert (heavier - gradient).norm() < 1e-3 * gradient.norm()


def test_the_loss_is_that_of_the_formula(make, load_models):
    """In float64, with an original that is loaded apart: the instance half predicts the noise, the
    class half what the original predicts for the same noisy latents, timestep and prompt."""
    made = make()
    disturb(made.denoiser)
    made.denoiser.double()
    _, apart, _ = load_models()
    apart.double()
    (batch,) = made.batches()
    x = batch["posteriors"].double()
    posterior_noise, noise = (n.double() for n in latents.sample_noise(3, [5, 6], (4, 16, 16), CPU))
    timesteps = (latents.sample_fractions(3, [5, 6]) * 1000).long()
    of_class = {"input_ids": batch["conditions"]["input_ids"][1:], "counts": [1, 1]}
    loss, halves = training_loss(
        made.denoiser, made.scheduler, x, batch["conditions"], posterior_noise, noise, timesteps,
        0.7, None, lambda *inputs: apart(*inputs, of_class).detach(),
    )  # fmt: skip
    a = made.scheduler.alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)
    noisy = a.sqrt() * (x[:, 0] + x[:, 1] * posterior_noise) + (1 - a).sqrt() * noise
    with torch.no_grad():
        predicted = made.denoiser(noisy, timesteps, batch["conditions"])
        own = apart(noisy, timesteps, batch["conditions"])
    instance = (predicted[:2] - noise[:2]).square().mean()
    kept = (predicted[2:] - own[2:]).square().mean()
    torch.testing.assert_close(halves.double(), torch.stack([instance, kept]), rtol=1e-4, atol=0)
    torch.testing.assert_close(loss.double(), instance + 0.7 * kept, rtol=1e-4, atol=0)


@pytest.mark.parametrize("use_lora", [False, True])
def test_training_changes_nothing_of_the_original(make, use_lora):
    """After three steps it predicts as before, bit for bit; and what requires gradients is what
    did, also if a prediction fails."""
    made = make(use_lora=use_lora)
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([10, 900])
    conditions = {"input_ids": torch.arange(48)[None] % 60, "counts": [2]}
    before = made.original(*inputs, conditions)
    trained = [name for name, p in made.denoiser.named_parameters() if p.requires_grad]
    parameters = [p for p in made.denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(3):
        gradients(made, 1.0)
        optimizer.step()
    assert torch.equal(made.original(*inputs, conditions), before)
    with torch.no_grad():
        assert not torch.equal(made.denoiser(*inputs, conditions), before)
    with pytest.raises(KeyError):
        made.original(*inputs, {})
    assert trained == [name for name, p in made.denoiser.named_parameters() if p.requires_grad]
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in parameters]
    with torch.no_grad():
        assert not torch.equal(made.denoiser(*inputs, conditions), before)


def test_what_was_forgotten_comes_back(make):
    """A disturbed model, of which almost only the class half is trained, predicts as the original
    does again."""
    made = make()
    disturb(made.denoiser, 0.02)
    parameters = [p for p in made.denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=4e-4)
    losses = []
    for _ in range(12):
        step_losses, _ = gradients(made, 1e4)
        losses.append(step_losses[2].item())
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


def test_both_targets_have_the_same_gradient_where_the_original_is_exact():
    """Latents from a Gaussian of variance 2, of which the best prediction of the noise is known; a
    model of one weight. Over 4,096 draws the mean gradients of the two targets agree within their
    standard error, and that of the original's varies less."""
    scheduler = DDPMScheduler()
    count = 4096
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 2 * count, 1, 1, 1, generator=generator)
    x = x * 2**0.5
    timesteps = torch.randint(0, 1000, (2 * count,), generator=generator)
    posteriors = torch.stack([x, torch.zeros_like(x)], 1)

    def exact(noisy, t, *conditions):
        a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt() / (2 * a + 1 - a) * noisy

    def mean_gradient(original):
        weight = torch.full((2 * count,), 0.3, requires_grad=True)  # one for each draw
        loss, _ = training_loss(
            lambda noisy, t, conditions: weight.view(-1, 1, 1, 1) * noisy, scheduler, posteriors,
            None, torch.zeros_like(x), noise, timesteps, 1.0, None, original,
        )  # fmt: skip
        loss.backward()
        own = weight.grad[count:] * count  # the class half's
        return own.mean(), own.std() / count**0.5

    (by_noise, error), (by_original, smaller) = mean_gradient(None), mean_gradient(exact)
    assert abs(by_noise - by_original) < 2 * error
    assert abs(by_noise) > 10 * error
    assert smaller < 0.9 * error


def test_a_run_with_it_goes_on_to_the_last_bit(run_and_resume, train_here, update):
    """The original is loaded again, as checkpoint and result hold nothing of it. (On two workers:
    test_klein.py.)"""
    expected, resumed, state = run_and_resume(1, prior_target="original")
    assert all(name.startswith(("unet.", "text_encoder.")) for name in state["weights"])
    assert len(state["weights"]) == len(state["optimizer"]["state"])
    assert torch.equal(update(resumed), update(expected))
    of_noise = train_here(**{**expected.changes, "prior_target": "noise"})
    assert (update(of_noise) - update(expected)).norm() > 0.1 * update(expected).norm()


def test_without_a_class_half_no_original_is_loaded(train_args, load_models, monkeypatch):
    _, denoiser, _ = load_models()
    monkeypatch.setattr(models, "load_denoiser", lambda *args: pytest.fail("loaded"))
    for flags in ({"prior_loss_weight": 0, "prior_target": "original"}, {}):
        assert models.load_original(train_args("out", **flags), denoiser, CPU) is None


def test_a_frozen_copy_takes_two_bytes_per_weight_where_products_are_in_bfloat16(make):
    """As the README and memory.py count it; norms and embeddings, a few weights, stay as they
    are."""
    for autocast, least, most in ((True, 2, 2.3), (False, 4, 4)):
        made = make(autocast=autocast)
        weights = list(made.original.args[0].parameters())
        count = sum(p.numel() for p in weights)
        assert least <= sum(p.nbytes for p in weights) / count <= most
