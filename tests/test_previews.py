"""Previews: of the models that train, from the same noise each time, and nothing where they are off
or an earlier run's."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dreambooth.files import generated_images
from dreambooth.run import previews, training_log

NUM_STEPS = 3


def make(train_args, folder, vae=None, denoiser=None, enabled=True, resolution=64, **flags):
    """A run's Previews and its log."""
    plan = SimpleNamespace(num_steps=NUM_STEPS, report_dir=folder, resolution=resolution)
    log = training_log.TrainingLog(plan, torch.device("cpu"), 1, time.time(), enabled)
    log.on_train_begin(0)
    args = train_args("out", **flags)
    return previews.Previews(args, plan, vae, denoiser, {}, log), log


@pytest.fixture(scope="module")
def run(train_args, load_models, generated, tmp_path_factory):
    """A run with previews of two prompts, in the few steps and with the guidance of `generated`:
    its weights change between steps 2 and 3. A namespace of its folder and what it left."""
    folder = tmp_path_factory.mktemp("run") / "out.report"
    vae, denoiser, _ = load_models()
    before = [p.clone() for p in denoiser.parameters()]
    random_state = torch.get_rng_state()
    flags = {"preview_prompts": generated.prompts, "preview_every": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(previews, "NUM_INFERENCE_STEPS", 2)
        patch.setattr(previews, "GUIDANCE_SCALE", 7.5)
        preview, log = make(train_args, folder, vae, denoiser, **flags)
        preview.on_train_begin(0)
        for step in (1, 2):
            preview.on_step_end(step, lr=1.0)
        unchanged = (
            all(map(torch.equal, denoiser.parameters(), before))
            and all(p.grad is None for p in denoiser.parameters())
            and denoiser.training
            and torch.equal(torch.get_rng_state(), random_state)
        )
        with torch.no_grad():
            for p in denoiser.unet.parameters():
                p.mul_(1.2)
        preview.on_step_end(3, lr=1.0)
        preview.on_train_end()
        log.on_train_end()
    return SimpleNamespace(
        folder=folder, metrics=log.metrics, unchanged=unchanged,
        pipeline=preview.pipeline, parts=(vae, denoiser.text_encoder, denoiser.unet),
    )  # fmt: skip


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_before_the_first_step_every_so_many_and_after_the_last(run, generated):
    found = previews.find(run.folder)
    assert {number: list(by_step) for number, by_step in found.items()} == {
        0: [0, 2, 3],
        1: [0, 2, 3],
    }
    record = generated_images.read_record(found[1][2])
    assert record == {"prompt": generated.prompts[1], "seed": 0, "step": 2}
    with Image.open(run.folder / "film-strip.png") as strip:  # a row per prompt
        assert strip.width > 3 * 128
        assert strip.height > 2 * 128
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    for prompt in generated.prompts:
        assert [image.step for image in events.Images(f"previews/{prompt}")] == [0, 2, 3]
    assert run.metrics["previews_s"] > 0


def test_what_differs_is_what_was_learned(run, generated):
    """The noise is the same at each step, and that of generate.py's first image: of the original
    model they show the same, to the rounding of another batch."""
    for number in (0, 1):
        by_step = previews.find(run.folder)[number]
        first, second, last = (pixels(by_step[step]) for step in (0, 2, 3))
        assert (first == second).all()
        assert np.abs(last - first).max() > 20
        image = pixels(generated.folder / generated_images.file_name(number, 0, 0))
        assert np.abs(image - first).max() <= 2


def test_training_goes_on_as_without_previews(run):
    """The same weights, without gradients, in training mode, of which none is copied; and the same
    random numbers."""
    assert run.unchanged
    pipeline = run.pipeline
    assert (pipeline.vae, pipeline.text_encoder, pipeline.unet) == run.parts


def test_training_goes_on_in_training_mode_after_a_preview_that_failed(
    train_args, load_models, tmp_path, monkeypatch
):
    def full(**settings):
        raise OSError(28, "No space left on device")

    vae, denoiser, _ = load_models()
    preview, log = make(
        train_args, tmp_path, vae, denoiser, preview_prompts=["photo of a car"], preview_every=1
    )
    monkeypatch.setattr(preview, "pipeline", full)
    preview.on_step_end(1)
    assert denoiser.training


def test_off_by_default_and_on_rank_0_alone(train_args, tmp_path):
    """Neither has models here."""
    on = {"preview_prompts": ["photo of a car"], "preview_every": 1}
    for flags in ({}, {**on, "enabled": False}):
        preview, log = make(train_args, tmp_path, **flags)
        preview.on_train_begin(0)
        for step in range(1, NUM_STEPS + 1):
            preview.on_step_end(step)
        preview.on_train_end()
        assert previews.find(tmp_path) == {}
        assert "previews_s" not in log.metrics


def test_previews_of_other_prompts_go_when_a_run_is_resumed_with_new_ones(train_args, tmp_path):
    """A row shows one prompt alone. Without any, those that there are stay."""
    for number, prompt in enumerate(("a red car", "a blue car")):
        file = tmp_path / previews.FOLDER / previews.file_name(number, 0)
        file.parent.mkdir(exist_ok=True)
        record = {"prompt": prompt, "seed": 0, "step": 0}
        generated_images.save_image(Image.new("RGB", (8, 8)), record, file)
    cases = ([], [0, 1]), (["a red car", "a green car"], [0]), (["a blue car", "a red car"], [])
    for prompts, kept in cases:
        flags = {"preview_prompts": prompts, "preview_every": 4} if prompts else {}
        preview, _ = make(train_args, tmp_path, **flags)
        preview.on_train_begin(1)
        assert list(previews.find(tmp_path)) == kept


def test_previews_of_steps_that_are_done_again_go(train_args, tmp_path, flat_image):
    """With a new run all, whether or not it has some of its own."""
    for number in (0, 1):
        for step in (0, 2, 4):
            name = previews.file_name(number, step)
            flat_image(name, 0, folder=tmp_path / previews.FOLDER)
    flat_image(previews.FILM_STRIP, 0)
    (tmp_path / previews.FOLDER / previews.file_name(0, 1)).touch()  # of a power cut
    preview, _ = make(train_args, tmp_path)
    preview.on_train_begin(2)
    assert [list(by_step) for by_step in previews.find(tmp_path).values()] == [[0, 2], [0, 2]]
    preview.on_train_begin(0)
    assert previews.find(tmp_path) == {}
    assert not (tmp_path / previews.FILM_STRIP).exists()


def test_a_preview_is_of_the_runs_seed_and_of_whole_pixels_of_the_pipeline(
    train_args, load_models, tmp_path, monkeypatch
):
    """Latents of 60 pixels can be trained on; a pipeline generates multiples of 8."""
    monkeypatch.setattr(previews, "NUM_INFERENCE_STEPS", 1)
    vae, denoiser, _ = load_models()
    shown = []
    for seed in (0, 1):
        flags = {"preview_prompts": ["photo of a car"], "preview_every": 1, "seed": seed}
        folder = tmp_path / str(seed)
        preview, log = make(train_args, folder, vae, denoiser, resolution=60, **flags)
        preview.on_train_begin(0)
        log.on_train_end()
        shown.append(pixels(previews.find(folder)[0][0]))
    assert [image.shape for image in shown] == [(56, 56, 3)] * 2
    assert np.abs(shown[0] - shown[1]).max() > 20
    assert preview.pipeline.guidance_scale == 5.0  # as the page says


def test_a_run_in_bfloat16_has_previews(train_args, load_models, tmp_path, monkeypatch):
    """Of weights in bfloat16 and a VAE in float32."""
    monkeypatch.setattr(previews, "NUM_INFERENCE_STEPS", 1)
    vae, denoiser, _ = load_models(param_dtype="bf16")
    flags = {"preview_prompts": ["photo of a car"], "preview_every": 1}
    preview, log = make(train_args, tmp_path, vae, denoiser, **flags)
    preview.on_train_begin(0)
    log.on_train_end()
    assert list(previews.find(tmp_path)[0]) == [0]


def test_a_film_strip_shows_all_previews_of_each_prompt(flat_image, tmp_path):
    """Also where one prompt has fewer, as it came later."""
    for number, steps in ((0, (0, 2, 4, 6)), (1, (6,))):
        for step in steps:
            flat_image(previews.file_name(number, step), 0, folder=tmp_path / previews.FOLDER)
    previews.write_film_strip(tmp_path)
    pixels = np.asarray(Image.open(tmp_path / previews.FILM_STRIP))
    assert (pixels[100] == 0).all(1).sum() == 4 * 128
