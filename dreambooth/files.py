"""A model's directory: what it says without the models being loaded, which would take seconds; and how it is
replaced whole, so that a crash never leaves half of one, nor harms the last one."""

import json
import os
import shutil
from pathlib import Path

from dreambooth.checks import UserError, check_output_dir

LORA_FILE = "pytorch_lora_weights.safetensors"
RESULT_NAMES = ["model_index.json", "tokenizer", "text_encoder", "vae", "unet", "scheduler", LORA_FILE]


def check_replaceable(folder, own_names, name="--output_dir"):
    """`folder` must be new, empty, or an earlier result: hold nothing but `own_names`.

    UserError, too, where it could not be replaced in the end: its parent cannot be written, or it is a
    mount point.
    """
    folder = Path(folder).resolve()
    check_output_dir(folder, name)
    check_output_dir(folder.parent, f"the directory of {name},")
    if os.path.ismount(folder):
        raise UserError(f"{name} {folder} is a mount point, which cannot be replaced: name a directory in it")
    others = sorted({file.name for file in folder.iterdir()} - set(own_names)) if folder.is_dir() else []
    if others:
        raise UserError(f"{name} {folder} holds other files ({others[0]}), which would be lost: name a new directory")


def replace_dir(folder, write):
    """Let `write(temporary)` fill a temporary directory, then put it in place of `folder`.

    A crash at any moment leaves the last one whole: under its own name, or, between the two renames,
    under .NAME.old beside it.
    """
    folder = Path(folder).resolve()
    new, old = (folder.with_name(f".{folder.name}.{word}") for word in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    write(new)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_tokenizer(model_dir):
    """The model's tokenizer."""
    from transformers import AutoTokenizer  # here: not every script needs it

    return AutoTokenizer.from_pretrained(model_dir, subfolder="tokenizer")


def model_resolution(model_dir):
    """The size of the model's pictures and the pixels along a side of one latent, both from its configuration."""
    unet, vae = (json.loads((Path(model_dir) / part / "config.json").read_text()) for part in ("unet", "vae"))
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    return unet["sample_size"] * scale, scale
