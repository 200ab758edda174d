"""A model's directory: what it says without the models being loaded, which would take seconds; and how it is
replaced whole, so that a crash never leaves half of one, nor harms the last one."""

import json
import os
import shutil
from pathlib import Path

from dreambooth.checks import MODEL_FILES, UserError, check_output_dir

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
    try:
        write(new)
    except Exception as error:
        shutil.rmtree(new, ignore_errors=True)
        if "No space left" in str(error):  # as an OSError or, from safetensors, as an error of its own
            raise UserError(f"no space left to write {folder}: nothing was saved, the last result is kept") from error
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def check_space(folder, model_dir, name="--output_dir"):
    """There must be room beside `folder` for a model of the size of `model_dir`."""
    weights = [file for names in MODEL_FILES for file in names if file.endswith(".safetensors")]
    needed = sum((Path(model_dir) / file).stat().st_size for file in weights if (Path(model_dir) / file).exists())
    existing = next(p for p in Path(folder).absolute().parents if p.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        raise UserError(f"{name} {folder}: {free / 1e9:.1f} GB are free there, the result takes {needed / 1e9:.1f} GB")


def load_tokenizer(model_dir):
    """The model's tokenizer."""
    from transformers import AutoTokenizer  # here: not every script needs it

    return AutoTokenizer.from_pretrained(model_dir, subfolder="tokenizer")


def model_resolution(model_dir):
    """The size of the model's pictures and the pixels along a side of one latent, both from its configuration."""
    unet, vae = (json.loads((Path(model_dir) / part / "config.json").read_text()) for part in ("unet", "vae"))
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    return unet["sample_size"] * scale, scale
