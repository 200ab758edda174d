"""A pipeline directory, judged without loading its models; prompts; fingerprints; loading it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dreambooth.cli import UserError
from dreambooth.files import pipeline_dir
from dreambooth.pocket.classes import POCKET_DIR


@pytest.fixture
def copied(model_dir, tmp_path):
    """A copy of the model that a test may damage."""
    return shutil.copytree(model_dir, tmp_path / "model")


def set_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_what_is_missing_is_named(copied, tmp_path):
    """A part, or a file of an interrupted copy, whose folder is there."""
    pipeline_dir.check_model_dir(copied)
    with pytest.raises(UserError, match="--compare_to .*nowhere: no such directory.*cache_model"):
        pipeline_dir.check_model_dir(tmp_path / "nowhere", "--compare_to")
    for name in (
        "model_index.json", "tokenizer", "text_encoder", "vae", "unet", "scheduler",
        "unet/config.json", "text_encoder/model.safetensors",
    ):  # fmt: skip
        aside = (copied / name).rename(tmp_path / "aside")
        assert pipeline_dir.missing_file(copied).startswith(name)
        with pytest.raises(UserError, match=f": {name}.* is missing"):
            pipeline_dir.check_model_dir(copied)
        aside.rename(copied / name)
    assert pipeline_dir.missing_file(copied) is None


def test_pickles_stand_for_safetensors_and_half_precision_copies_do_not(copied):
    """The loaders do not read files of the latter's name."""
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    half = weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(UserError, match="unet/diffusion_pytorch_model.safetensors is missing"):
        pipeline_dir.check_model_dir(copied)
    pickle = weights.with_suffix(".bin")
    torch.save(load_file(half), pickle)
    pipeline_dir.check_model_dir(copied)
    assert pickle in pipeline_dir.weight_files(copied)


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "model_index.json"])
def test_a_truncated_file_is_named(copied, file):
    content = (copied / file).read_bytes()
    (copied / file).write_bytes(content[:-100])
    with pytest.raises(UserError, match=f"--compare_to: .*{file} is damaged") as error:
        pipeline_dir.check_model_dir(copied, "--compare_to")
    assert "\n" not in str(error.value)


def test_models_that_the_scripts_cannot_train_are_refused(copied):
    """Those of another prediction type than the loss; and SDXL, whose directory has all these
    files, and a second text encoder."""
    config = copied / "scheduler" / "scheduler_config.json"
    set_json(config, prediction_type="v_prediction")
    pipeline_dir.check_model_dir(copied)
    set_json(config, prediction_type="sample")
    with pytest.raises(UserError, match="predicts sample"):
        pipeline_dir.check_model_dir(copied)
    set_json(copied / "model_index.json", _class_name="StableDiffusionXLPipeline")
    with pytest.raises(UserError, match="is a StableDiffusionXLPipeline"):
        pipeline_dir.check_model_dir(copied)


def test_number_of_parameters(copied, load_models):
    """From the headers of safetensors; a pickle counts as float32, as on the Hub. (Those here are
    float16.)"""
    vae, denoiser, _ = load_models(copied)
    models = {"vae": vae, "unet": denoiser.unet, "text_encoder": denoiser.text_encoder}
    expected = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert pipeline_dir.num_parameters(copied) == expected
    unet = copied / "unet" / "diffusion_pytorch_model.safetensors"
    pickle = unet.with_suffix(".bin")
    shutil.copy(unet, pickle)
    assert pipeline_dir.num_parameters(copied) == expected  # nothing counts twice
    unet.unlink()
    assert pipeline_dir.num_parameters(copied)["unet"] == pickle.stat().st_size // 4


def test_resolution_comes_from_the_configuration(copied):
    """16 latents a side, each for 4 pixels: the VAE has three levels, so it halves twice."""
    assert pipeline_dir.resolution(copied) == (64, 4)
    set_json(copied / "unet" / "config.json", sample_size=24)
    set_json(copied / "vae" / "config.json", block_out_channels=[16, 32, 64, 64])
    assert pipeline_dir.resolution(copied) == (192, 8)


def test_a_prompt_that_is_too_long_is_quoted_where_it_would_be_cut_off(model_dir):
    """48 tokens, two of which mark beginning and end: 46 words fit."""
    longest = "photo of a car " + "on the " * 21
    assert len(longest.split()) == 46
    pipeline_dir.check_prompts(model_dir, [longest])
    with pytest.raises(UserError, match="48; 'at night' would be cut off") as error:
        pipeline_dir.check_prompts(model_dir, [longest, longest + "at night"])
    assert "prompt too long" in str(error.value)


def test_pocket_alone_is_asked_for_its_classes(model_dir, tmp_path):
    """Wherever it lies: run.sh uses the copy in the cache."""
    pipeline_dir.check_prompts(model_dir, ["photo of a dog"])
    for folder in (POCKET_DIR, shutil.copytree(POCKET_DIR, tmp_path / "cached")):
        pipeline_dir.check_prompts(folder, ["photo of a car"])
        with pytest.raises(UserError, match="'photo of a dog': the pocket model"):
            pipeline_dir.check_prompts(folder, ["photo of a car", "photo of a dog"])


def test_fingerprint_tells_models_apart(model_dir, broken_model_dir, lora_dir, copied):
    """By weights, also of a pickle beside safetensors, and by configurations; wherever they lie."""
    fingerprints = {pipeline_dir.fingerprint(path) for path in (broken_model_dir, lora_dir)}
    fingerprints.add(pipeline_dir.fingerprint(copied))
    assert pipeline_dir.fingerprint(model_dir) == pipeline_dir.fingerprint(copied)
    set_json(copied / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    fingerprints.add(pipeline_dir.fingerprint(copied))
    (copied / "text_encoder" / "model.safetensors").unlink()
    for content in (b"a", b"b"):
        (copied / "text_encoder" / "pytorch_model.bin").write_bytes(content)
        fingerprints.add(pipeline_dir.fingerprint(copied))
    assert len(fingerprints) == 6


def test_directory_of_a_revision_is_that_of_the_hubs_cache(tmp_path):
    folder = pipeline_dir.snapshot_dir(tmp_path, "CompVis/stable-diffusion-v1-4", "abc")
    assert folder == tmp_path / "models--CompVis--stable-diffusion-v1-4" / "snapshots" / "abc"
    assert pipeline_dir.name_and_revision(folder) == ("CompVis/stable-diffusion-v1-4", "abc")
    assert pipeline_dir.name_and_revision("/data/my-model") == ("my-model", "")


def test_a_lora_directory_has_weights_that_are_whole(lora_dir, tmp_path):
    """Whatever the file's name."""
    file = tmp_path / "my_car.safetensors"
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            UserError, match=f"--lora_weights_dir {folder}: no {pipeline_dir.LORA_FILE}"
        ):
            pipeline_dir.check_lora_dir(folder)
    shutil.copy(lora_dir / pipeline_dir.LORA_FILE, file)
    pipeline_dir.check_lora_dir(tmp_path)
    with pytest.raises(UserError, match=f"is a file: give its folder, {tmp_path}$"):
        pipeline_dir.check_lora_dir(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="my_car.safetensors is damaged"):
        pipeline_dir.check_lora_dir(tmp_path)


def test_a_pipeline_is_loaded_around_the_models_in_memory(model_dir, load_models):
    """As previews need it: the run's U-Net, the directory's other parts. There is no safety
    checker, whose black images would be trained on as class images."""
    _, denoiser, _ = load_models()
    pipeline = pipeline_dir.load_pipeline(model_dir, torch.bfloat16, unet=denoiser.unet)
    assert pipeline.unet is denoiser.unet
    assert pipeline.vae.dtype == torch.bfloat16
    assert pipeline.safety_checker is None
