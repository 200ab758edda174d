"""--prior_loss_weight 0: training without prior preservation needs no class images, and computes
nothing for them."""

import numpy as np
import pytest
import torch

import train
from dreambooth import dataset, latents
from dreambooth.cli import UserError
from dreambooth.loss import prior_preserving_loss
from dreambooth.training_plan import make_plan

WITHOUT = {"prior_loss_weight": 0, "class_images_dir": False, "class_prompt": False}


def test_the_plan_is_of_the_instance_images_alone(train_args, tmp_path, instance_dir):
    """Five photos, four epochs, two per step: ten steps."""
    args = train_args(tmp_path / "out", **WITHOUT, train_batch_size=2, max_train_steps=100)
    plan = make_plan(args)
    assert plan.instance_paths == sorted(instance_dir.iterdir())
    assert plan.class_paths == []
    assert len(plan.prompt_ids) == 1
    assert plan.num_steps == 10


def test_class_images_that_are_given_all_the_same_are_not_looked_at(train_args, tmp_path):
    args = train_args(tmp_path / "out", prior_loss_weight=0, class_images_dir=tmp_path / "nowhere")
    assert make_plan(args).class_paths == []


@pytest.mark.parametrize("name", ["class_images_dir", "class_prompt"])
def test_with_prior_preservation_class_images_and_prompt_are_needed(train_args, tmp_path, name):
    with pytest.raises(UserError, match="missing: give both, or --prior_loss_weight 0"):
        make_plan(train_args(tmp_path / "out", **{name: False}))


def test_the_instance_images_come_in_the_same_order(instance_dir, class_dir):
    instances = sorted(instance_dir.iterdir())
    with_class = dataset.pair_images(instances, sorted(class_dir.iterdir()), 13, seed=3)
    without = dataset.pair_images(instances, [], 13, seed=3)
    assert without == [
        {"position": pair["position"], "instance": pair["instance"]} for pair in with_class
    ]


def test_a_batch_is_the_instance_half_of_one_with_class_images():
    rng = np.random.default_rng(0)
    batch = {"position": np.arange(2)}
    for kind in dataset.KINDS:
        batch[f"{kind}_image"] = rng.integers(0, 256, (2, 3, 8, 8), np.uint8)
        batch[f"{kind}_key"] = np.array([f"{kind} 0", f"{kind} 1"])
    both = dataset.collate(batch)
    instance = {name: column for name, column in batch.items() if not name.startswith("class")}
    alone = dataset.collate(instance)
    assert torch.equal(alone["images"], both["images"][:2])
    assert alone["keys"] == both["keys"][:2]
    assert alone["positions"] == both["positions"]


def test_the_loss_is_the_instance_half_of_the_prior_preserving_loss():
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 4, 4, 8, 8, generator=generator)
    weights = torch.rand(4, generator=generator)
    for factors in (None, weights):
        half = None if factors is None else factors[:2]
        both, halves = prior_preserving_loss(prediction, target, 0, factors)
        alone, half_alone = prior_preserving_loss(prediction[:2], target[:2], None, half)
        torch.testing.assert_close(alone, both)
        torch.testing.assert_close(half_alone, halves[:1])


def test_a_step_has_the_gradients_of_one_whose_class_half_weighs_nothing(
    load_models, train_args, tmp_path
):
    """The same noise and timesteps for the instance images, and half of the forward pass."""
    vae, denoiser, scheduler = load_models()
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    prompt_ids = torch.arange(96).view(2, 48)
    sizes = []
    denoiser.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))

    def gradients(num_images, weight):
        posteriors = latents.encode(vae, images[:num_images])
        batches = iter([{"posteriors": posteriors, "positions": [5, 6]}])
        args = train_args(tmp_path / "out", prior_loss_weight=weight)
        denoiser.zero_grad()
        loss = train.forward_backward(
            denoiser, scheduler, batches, prompt_ids[: num_images // 2], args
        )
        return loss, [p.grad.clone() for p in denoiser.parameters() if p.grad is not None]

    alone_loss, alone = gradients(2, weight=0)
    both_loss, both = gradients(4, weight=1e-12)
    assert sizes == [2, 4]
    torch.testing.assert_close(alone_loss, both_loss[:2])  # in all, and of the instance half
    for mine, other in zip(alone, both, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-6)
