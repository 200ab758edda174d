"""The candidates for the recipe: each changes what it says, and training with it."""

from argparse import Namespace

import pytest
import torch

from tests.benchmarks import candidates, subjects


@pytest.fixture
def train(train_args, model_dir, tmp_path, monkeypatch):
    """train(name) trains two steps, of two pairs each, with a candidate, or with the recipe."""
    monkeypatch.setattr(candidates, "OTHER_EVERY", 2)
    monkeypatch.setattr(candidates, "NUM_OTHER_IMAGES", 1)
    monkeypatch.setattr(candidates.render, "CLASSES", ["car", "house"])
    args = train_args(tmp_path / "out", train_batch_size=2, max_train_steps=2, lr=1e-3)
    bench_args = Namespace(model_dir=str(model_dir), work_dir=str(tmp_path / "work"))

    def train(name=None):
        with candidates.changed_training(name, bench_args):
            return subjects.train_here(args)

    return train


@pytest.fixture
def original(load_models):
    """The denoiser before training."""
    return load_models()[1]


def moved(denoiser, original, part):
    """How far the weights of a part have moved, at the median."""
    now, before = [
        torch.cat([p.detach().flatten() for p in getattr(model, part).parameters()])
        for model in (denoiser, original)
    ]
    return (now - before).abs().median()


@pytest.mark.parametrize("name", list(candidates.CANDIDATES))
def test_each_candidate_trains_another_model_than_the_recipe(train, original, name):
    by_recipe, by_candidate = train(), train(name)
    assert moved(by_candidate, by_recipe, "unet") > 0
    assert moved(by_candidate, original, "unet") > 1e-4
    assert all(p.isfinite().all() for p in by_candidate.parameters())


def test_a_candidate_leaves_nothing_behind(train):
    before = train()
    train("mirror")
    assert moved(train(), before, "unet") == 0


def test_the_text_encoder_moves_at_a_quarter_of_the_rate(train, original):
    """Adam's first steps are as long as the learning rate."""
    by_recipe = moved(train(), original, "text_encoder")
    by_candidate = moved(train("text_encoder_lr"), original, "text_encoder")
    assert by_candidate / by_recipe == pytest.approx(candidates.TEXT_ENCODER_LR, rel=0.1)


def test_an_average_of_the_weights_lags_behind_them(train, original):
    assert moved(train("ema"), original, "unet") < moved(train(), original, "unet")


def test_other_images_have_their_own_prompts(train, monkeypatch):
    """The second of each two pairs has a class image of its own, and its prompt."""
    prompts = []
    loss = candidates.train.training_loss

    def training_loss(denoiser, scheduler, posteriors, prompt_ids, *rest):
        prompts.append(prompt_ids)
        return loss(denoiser, scheduler, posteriors, prompt_ids, *rest)

    monkeypatch.setattr(candidates.train, "training_loss", training_loss)
    train("other_classes")
    first, second = prompts
    assert torch.equal(first[0], first[1])  # the instance prompt, of both pairs
    assert torch.equal(first[2], second[2])  # the class prompt
    assert not torch.equal(second[2], second[3])
    assert not torch.equal(first[3], second[3])  # one class, then the next one
