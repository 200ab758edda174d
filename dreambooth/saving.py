"""The result of a training run on disk: a complete pipeline directory, or the file of a LoRA."""

from functools import partial

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from dreambooth import atomic
from dreambooth.models import LORA_TARGETS


def save(denoiser, args):
    """Write the result of a run to `args.output_dir`."""
    if args.use_lora:
        save_lora(denoiser, args.output_dir)
    else:
        save_pipeline(denoiser, args.model_dir, args.output_dir)


def save_pipeline(denoiser, model_dir, output_dir):
    """Write a complete pipeline directory: the denoiser's models, which move to the CPU, the rest
    as in `model_dir`. All in float32: loaders that are told no precision would mix several."""
    denoiser.to("cpu", torch.float32)
    atomic.replace_dir(output_dir, partial(_write_pipeline, denoiser, model_dir))


def save_lora(denoiser, output_dir):
    """Write the LoRA matrices as diffusers' `load_lora_weights` reads them."""
    atomic.replace_dir(output_dir, partial(_write_lora, denoiser))


def _write_pipeline(denoiser, model_dir, folder):
    pipeline = StableDiffusionPipeline.from_pretrained(
        model_dir,
        text_encoder=denoiser.text_encoder,
        unet=denoiser.unet,
        dtype=torch.float32,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    weights = folder / "text_encoder" / "model.safetensors"
    save_file(_with_hub_names(load_file(weights)), weights, metadata={"format": "pt"})
    atomic.apply_umask(folder)


def _write_lora(denoiser, folder):
    layers = {}
    for part in LORA_TARGETS:
        model = getattr(denoiser, part)
        if hasattr(model, "peft_config"):
            layers[part] = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
            layers[part] = {_with_one_layout(k): v for k, v in layers[part].items()}
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=_with_hub_names(layers.get("text_encoder", {})),
    )
    atomic.apply_umask(folder)


def _with_one_layout(name):
    """diffusers renames the matrices of attention alone; of a file with both kinds of names it
    would load one kind, and say nothing."""
    return name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")


def _with_hub_names(text_encoder_weights):
    """The weights under the names that the Hub's files have and every loader knows: transformers 5
    leaves out their first part, and older versions would silently start from random weights."""
    return {
        f"text_model.{name.removeprefix('text_model.')}": weight
        for name, weight in text_encoder_weights.items()
    }
