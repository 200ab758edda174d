"""What training writes: who can read it, what can load it, and what it replaces."""

import os

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from dreambooth.cli import UserError
from dreambooth.run import export
from dreambooth.run.plan import check_flags


@pytest.fixture
def save(load_models, train_args, tmp_path):
    """Save what a run with some flags would: returns the folder and the denoiser."""

    def write(**changes):
        _, denoiser, _ = load_models(**changes)
        export.save(denoiser, train_args(tmp_path / "out", **changes))
        return tmp_path / "out", denoiser

    return write


@pytest.mark.parametrize("use_lora", [False, True])
def test_files_have_the_mode_of_new_files(save, use_lora):
    """safetensors makes its files readable by their owner alone, whatever the umask: on shared
    storage nobody else could use them."""
    before = os.umask(0o027)
    try:
        folder, _ = save(use_lora=use_lora)
    finally:
        os.umask(before)
    files = [path for path in folder.rglob("*") if path.is_file()]
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert len(weights) == (1 if use_lora else 3)
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o750}


@pytest.mark.parametrize("frozen_text_encoder", [False, True])
def test_bfloat16_weights_become_a_result_of_one_precision_that_plain_diffusers_generates_with(
    save, load_models, frozen_text_encoder
):
    """Loaded as anybody would, without a dtype: transformers takes a file's own and diffusers
    float32, so that a text encoder in bfloat16 would not fit its U-Net. float32 holds every number
    of bfloat16: nothing is lost."""
    changes = {"param_dtype": "bf16", "no_train_text_encoder": frozen_text_encoder}
    folder, _ = save(**changes)
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            names = weights.keys()
            assert {weights.get_slice(name).get_dtype() for name in names} == {"F32"}
    _, trained, _ = load_models(**changes)
    _, loaded, _ = load_models(folder)
    assert next(trained.unet.parameters()).dtype == torch.bfloat16
    for before, after in zip(trained.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(before.float(), after)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("photo of a car", num_inference_steps=2, height=64, width=64).images[0]
    assert image.size == (64, 64)


def test_a_lora_does_not_replace_a_model_nor_a_model_a_lora(save, train_args, tmp_path):
    """A LoRA with the model's $TUNED_MODEL_DIR would lose the model."""
    for use_lora in (False, True):
        folder, _ = save(use_lora=use_lora)
        folder.with_name(f"{folder.name}.report").mkdir(exist_ok=True)
        check_flags(train_args(folder, use_lora=use_lora))
        with pytest.raises(UserError, match="holds other files .*, which would be lost"):
            check_flags(train_args(folder, use_lora=not use_lora))
        folder.rename(tmp_path / str(use_lora))
