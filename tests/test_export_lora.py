"""A LoRA in kohya's layout converts back to the same tensors, bit for bit."""

import argparse

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from dreambooth import export_lora, image_generator, saving
from dreambooth.cli import UserError
from dreambooth.model_dir import LORA_FILE


def export(lora_dir, output, lora_format="kohya"):
    export_lora.main(
        argparse.Namespace(lora_dir=str(lora_dir), output=str(output), lora_format=lora_format)
    )
    return load_file(output)


@pytest.mark.parametrize("layers", ["attention", "all"])
def test_kohyas_layout_converts_back_bit_for_bit(load_models, tmp_path, layers):
    _, denoiser, _ = load_models(use_lora=True, lora_layers=layers)
    saving.save_lora(denoiser, tmp_path / "lora")
    original = export_lora.to_peft(load_file(tmp_path / "lora" / LORA_FILE))
    export(tmp_path / "lora", tmp_path / "subject.safetensors")
    weights, alphas = StableDiffusionPipeline.lora_state_dict(tmp_path / "subject.safetensors")
    back = export_lora.to_peft(weights)
    assert set(back) == set(original)
    assert len(back) > 100
    assert all(torch.equal(back[name], original[name]) for name in back)
    assert set(alphas.values()) == {4.0}  # the rank: a scale of 1


def test_the_exported_file_has_the_mode_of_new_files(lora_dir, tmp_path):
    export(lora_dir, tmp_path / "subject.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "subject.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_names_are_kohyas(lora_dir, tmp_path):
    """As its scripts name them for models with one text encoder."""
    names = set(export(lora_dir, tmp_path / "subject.safetensors"))
    assert {name.split("_")[1] for name in names} == {"unet", "te"}
    assert {name.rpartition(".")[0].count(".") for name in names} <= {0, 1}
    endings = {name.partition(".")[2] for name in names}
    assert endings == {"lora_down.weight", "lora_up.weight", "alpha"}


def test_the_exported_file_generates_the_same_image(lora_dir, model_dir, tmp_path):
    export(lora_dir, tmp_path / "subject.safetensors")
    images = []
    for file in (lora_dir, tmp_path / "subject.safetensors"):
        pipeline = image_generator.load_pipeline(model_dir, "cpu", file)
        generator = torch.Generator().manual_seed(0)
        settings = {"num_inference_steps": 2, "output_type": "pt", "generator": generator}
        images.append(pipeline("photo of a car", **settings).images)
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-6)


def test_mistakes_are_named(lora_dir, tmp_path):
    with pytest.raises(UserError, match=r"must end with \.safetensors"):
        export(lora_dir, tmp_path / "subject.bin")
    with pytest.raises(UserError, match="no pytorch_lora_weights"):
        export(tmp_path, tmp_path / "subject.safetensors")
    export(lora_dir, tmp_path / "subject.safetensors")
    with pytest.raises(UserError, match="no pytorch_lora_weights"):
        export(tmp_path, tmp_path / "again.safetensors")
