"""Previews: the models that train, the same noise each time, and nothing when they are off."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import train
from dreambooth import metrics, outputs, previews
from dreambooth.cli import UserError
from dreambooth.training_checks import check_numbers
from tests.test_metrics import make_report

PROMPTS = ["photo of unqtkn car", "photo of a car"]


@pytest.fixture
def make(train_args, load_models, model_dir, tmp_path, monkeypatch):
    """A run's Previews, quick ones, with its models: make(preview_every=2)."""
    monkeypatch.setattr(previews, "NUM_INFERENCE_STEPS", 2)

    def build(**changes):
        changes = {"preview_prompts": PROMPTS, "preview_every": 2, **changes}
        args = train_args(tmp_path / "out", **changes)
        vae, denoiser, _ = load_models()
        report = make_report(tmp_path / "out", num_steps=5)
        plan = SimpleNamespace(num_steps=5)
        preview = previews.Previews(args, plan, vae, denoiser, report)
        return SimpleNamespace(preview=preview, denoiser=denoiser, vae=vae, report=report)

    return build


def pixels(path):
    return outputs.pixel_digest(Image.open(path))


def test_before_the_first_step_every_so_many_and_after_the_last(make):
    run = make()
    for step in range(6):
        run.preview.step_is_done(step)
    found = previews.find(run.report.folder)
    assert {number: list(by_step) for number, by_step in found.items()} == {
        0: [0, 2, 4, 5],
        1: [0, 2, 4, 5],
    }
    assert outputs.read_record(found[1][4]) == {"prompt": PROMPTS[1], "seed": 0, "step": 4}
    strip = Image.open(run.report.folder / previews.FILM_STRIP)
    assert strip.width >= 4 * 128
    assert strip.height >= 2 * 128
    assert run.report.metrics["previews_s"] > 0


def test_same_weights_give_the_same_image_and_others_another(make):
    """The noise is the same at each step, so what differs is what was learned."""
    run = make()
    run.preview.step_is_done(0)
    run.preview.step_is_done(2)
    with torch.no_grad():
        for p in run.denoiser.unet.parameters():
            p.mul_(1.2)
    run.preview.step_is_done(4)
    by_step = previews.find(run.report.folder)[0]
    assert pixels(by_step[0]) == pixels(by_step[2]) != pixels(by_step[4])


def test_no_weight_is_copied_and_training_goes_on_as_before(make):
    run = make()
    before = {name: p.clone() for name, p in run.denoiser.named_parameters()}
    state = torch.get_rng_state()
    run.preview.step_is_done(0)
    pipeline = run.preview.pipeline
    assert pipeline.unet is run.denoiser.unet
    assert pipeline.text_encoder is run.denoiser.text_encoder
    assert pipeline.vae is run.vae
    assert run.denoiser.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in run.denoiser.named_parameters())
    assert all(p.grad is None for p in run.denoiser.parameters())


def test_off_by_default(make):
    run = make(preview_prompts=False, preview_every=0)
    for step in range(6):
        run.preview.step_is_done(step)
    assert run.preview.pipeline is None
    assert not (run.report.folder / previews.FOLDER).exists()
    assert "previews_s" not in run.report.metrics


def test_only_rank_0_generates(make):
    run = make()
    report = make_report(metrics.report_dir("elsewhere"), enabled=False)
    args = SimpleNamespace(preview_prompts=PROMPTS, preview_every=2, seed=0, model_dir="")
    preview = previews.Previews(args, SimpleNamespace(num_steps=5), run.vae, run.denoiser, report)
    preview.step_is_done(0)
    assert preview.pipeline is None


def test_a_resumed_run_drops_later_previews(make):
    run = make()
    for step in (0, 2, 4):
        run.preview.step_is_done(step)
    previews.remove_later(run.report.folder, 2)
    assert list(previews.find(run.report.folder)[0]) == [0, 2]


@pytest.mark.parametrize("flags", [{"preview_prompts": ["a car"]}, {"preview_every": 5}])
def test_prompts_and_interval_go_together(train_argv, tmp_path, flags):
    args = train.parse_args(train_argv(tmp_path / "out", **flags))
    with pytest.raises(UserError, match="--preview_prompts and --preview_every go together"):
        check_numbers(args)
