"""What training writes: who can read it, and what can load it."""

import os

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from dreambooth import saving
from dreambooth.cli import UserError
from dreambooth.training_checks import check_flags
from dreambooth.training_plan import make_plan

KINDS = {
    "float32": {},
    "bfloat16": {"param_dtype": "bf16"},
    "frozen text encoder": {"param_dtype": "bf16", "no_train_text_encoder": True},
    "LoRA": {"use_lora": True},
}


def check_and_plan(args):
    check_flags(args)
    return make_plan(args)


@pytest.fixture
def save(load_models, train_args, tmp_path):
    """Save what a run with some flags would: returns the folder and the denoiser."""

    def write(**changes):
        _, denoiser, _ = load_models(**changes)
        saving.save(denoiser, train_args(tmp_path / "out", **changes))
        return tmp_path / "out", denoiser

    return write


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
@pytest.mark.parametrize("kind", ["float32", "LoRA"])
def test_files_have_the_mode_of_new_files(save, kind, umask):
    """safetensors makes its files readable by their owner alone, whatever the umask."""
    before = os.umask(umask)
    try:
        folder, _ = save(**KINDS[kind])
    finally:
        os.umask(before)
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len([file for file in files if file.suffix == ".safetensors"]) == (
        1 if kind == "LoRA" else 3
    )
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o777 & ~umask}


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "frozen text encoder"])
def test_a_result_is_of_one_precision_and_plain_diffusers_generates_with_it(save, kind):
    """Loaded as anybody would, without a dtype: transformers takes a file's own and diffusers
    float32, so that a text encoder in bfloat16 does not fit its U-Net."""
    folder, denoiser = save(**KINDS[kind])
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            names = weights.keys()
            assert {weights.get_slice(name).get_dtype() for name in names} == {"F32"}
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    for part in ("unet", "text_encoder", "vae"):
        assert getattr(pipeline, part).dtype == torch.float32
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("photo of a car", num_inference_steps=2, height=64, width=64).images[0]
    assert image.size == (64, 64)


def test_bfloat16_weights_are_saved_exactly(load_models, save):
    """float32 holds every number of bfloat16."""
    folder, _ = save(param_dtype="bf16")
    _, trained, _ = load_models(param_dtype="bf16")
    _, loaded, _ = load_models(folder)
    for before, after in zip(trained.parameters(), loaded.parameters(), strict=True):
        assert before.dtype == torch.bfloat16
        assert torch.equal(before.float(), after)


def test_a_lora_does_not_replace_a_model_nor_a_model_a_lora(save, train_args, tmp_path):
    """README's LoRA with the model's $TUNED_MODEL_DIR would have lost the model."""
    for kind, other in (("float32", "LoRA"), ("LoRA", "float32")):
        folder, _ = save(**KINDS[kind])
        check_and_plan(train_args(folder, **KINDS[kind]))
        with pytest.raises(UserError, match="holds other files .*, which would be lost") as error:
            check_and_plan(train_args(folder, **KINDS[other]))
        assert "\n" not in str(error.value)
        folder.rename(tmp_path / kind)
