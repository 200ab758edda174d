"""A diffusers pipeline directory: its layout, checks that load no model, its fingerprint."""

import hashlib
import json
import math
import warnings
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dreambooth.cli import UserError
from dreambooth.pocket import classes

# What a pipeline directory must have: one file of each row.
PIPELINE_FILES = [
    ("model_index.json",),
    ("scheduler/scheduler_config.json",),
    ("tokenizer/tokenizer.json", "tokenizer/merges.txt"),
    ("tokenizer/tokenizer.json", "tokenizer/vocab.json"),
    ("text_encoder/config.json",),
    ("vae/config.json",),
    ("unet/config.json",),
    ("text_encoder/model.safetensors", "text_encoder/pytorch_model.bin"),
    ("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin"),
    ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin"),
]
PIPELINE_NAMES = ["model_index.json", "tokenizer", "text_encoder", "vae", "unet", "scheduler"]
LORA_FILE = "pytorch_lora_weights.safetensors"
CARD_FILES = ["README.md", "before-after.png"]  # the model card


def snapshot_dir(cache_dir, model_name, revision):
    """Where the Hub's cache layout keeps a revision of a model: its pipeline directory."""
    return Path(cache_dir) / f"models--{model_name.replace('/', '--')}" / "snapshots" / revision


def name_and_revision(model_dir):
    """The Hub's name of a model in its cache layout, and the revision; of another directory its
    own name, and ""."""
    folder = Path(model_dir)
    parent = folder.parent.parent.name
    if folder.parent.name == "snapshots" and parent.startswith("models--"):
        return parent.removeprefix("models--").replace("--", "/"), folder.name
    return folder.name, ""


def missing_file(model_dir):
    """The first file of a pipeline that `model_dir` lacks; None if it is complete."""
    for names in PIPELINE_FILES:
        if not any((Path(model_dir) / name).exists() for name in names):
            return names[0]
    return None


def check_model_dir(model_dir, flag="--model_dir"):
    """`model_dir` must be a complete pipeline directory of Stable Diffusion 1.x or 2.x."""
    folder = Path(model_dir)
    if not folder.is_dir():
        raise UserError(
            f"{flag} {folder}: no such directory; a model of the Hub is downloaded with"
            " cache_model.py, which prints the directory to use"
        )
    missing = missing_file(folder)
    if missing:
        raise UserError(
            f"{flag} {folder} is not a diffusers pipeline directory: {missing} is missing"
            " (cache_model.py prints the directory to use)"
        )
    for names in PIPELINE_FILES:
        name = next(name for name in names if (folder / name).exists())  # the one that is loaded
        check_not_damaged(folder / name, flag)
    pipeline = _read_json(folder / "model_index.json").get("_class_name")
    if pipeline != "StableDiffusionPipeline":
        raise UserError(
            f"{flag} {folder} is a {pipeline}; these scripts take Stable Diffusion 1.x and 2.x"
        )
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    prediction_type = scheduler.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(
            f"{flag} {folder} predicts {prediction_type};"
            " these scripts take epsilon and v_prediction"
        )


def check_not_damaged(file, flag):
    """`file` must be valid JSON, safetensors as long as their header says, or a complete pickle of
    weights alone. No code in a pickle is run, here or later."""
    try:
        if file.suffix == ".json":
            _read_json(file)
        if file.suffix == ".safetensors":
            with safe_open(file, "np"):
                pass
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{flag}: {file} is damaged ({error}); fetch or copy it again") from None
    if file.suffix == ".bin":
        _check_pickle(file, flag)


def _check_pickle(file, flag):
    import torch  # here: only older models have pickles

    try:
        with warnings.catch_warnings(action="ignore"):
            # Memory-mapped, no weight is read; pickles of before torch 1.6 cannot be.
            torch.load(file, "cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except Exception as error:  # damaged bytes can end in any
        raise UserError(
            f"{flag}: {file} is damaged, or holds code, which was not run"
            f" ({type(error).__name__}); fetch it again, or a model with safetensors"
        ) from None


def _read_json(file):
    return json.loads(file.read_text())


def weight_files(model_dir):
    """The files of the models' weights: safetensors, or the pickles in their place."""
    files = []
    for names in PIPELINE_FILES:
        weights = [Path(model_dir) / name for name in names if not name.endswith((".json", ".txt"))]
        files += [file for file in weights if file.exists()][:1]
    return files


def num_parameters(model_dir):
    """The numbers of parameters of "unet", "text_encoder" and "vae": from the headers of their
    safetensors; of pickles from their size, as if in float32, which they are on the Hub."""
    numbers = {}
    for file in weight_files(model_dir):
        if file.suffix == ".safetensors":
            with safe_open(file, "np") as weights:
                slices = [weights.get_slice(name) for name in weights.keys()]  # noqa: SIM118
                numbers[file.parent.name] = sum(math.prod(part.get_shape()) for part in slices)
        else:
            numbers[file.parent.name] = file.stat().st_size // 4
    return numbers


def num_trained(sizes, train_text_encoder=True):
    """Of the numbers of parameters `sizes`, as `num_parameters` gives them, those that full
    fine-tuning trains."""
    return sizes["unet"] + (sizes["text_encoder"] if train_text_encoder else 0)


def resolution(model_dir):
    """The side of the model's images, and of the square of pixels that one latent stands for."""
    unet = _read_json(Path(model_dir) / "unet" / "config.json")
    vae = _read_json(Path(model_dir) / "vae" / "config.json")
    pixels_per_latent = 2 ** (len(vae["block_out_channels"]) - 1)
    return unet["sample_size"] * pixels_per_latent, pixels_per_latent


def load_tokenizer(model_dir):
    """The model's tokenizer."""
    from transformers import AutoTokenizer  # here: takes seconds, and not every script needs it

    return AutoTokenizer.from_pretrained(model_dir, subfolder="tokenizer")


def load_pipeline(model_dir, dtype=None, **parts):
    """The pipeline in `model_dir`; `parts`, models by name, take the place of those in the
    directory. Without the safety checker, whose black images would be trained on as class images.
    """
    from diffusers import StableDiffusionPipeline  # here: takes seconds

    return StableDiffusionPipeline.from_pretrained(
        model_dir,
        dtype=dtype,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )


def check_prompts(model_dir, prompts):
    """Each of `prompts` must fit the model's tokenizer, else a UserError quotes what would be cut
    off; and for pocket it must name a class that it knows."""
    tokenizer = load_tokenizer(model_dir)
    limit = tokenizer.model_max_length
    for prompt in prompts:
        ids = tokenizer(prompt, verbose=False).input_ids
        if len(ids) > limit:
            lost = tokenizer.decode(ids[limit - 1 : -1]).strip()
            raise UserError(
                f"prompt too long: {prompt!r} has {len(ids)} tokens, the model takes {limit};"
                f" {lost!r} would be cut off"
            )
    if fingerprint(model_dir) == fingerprint(classes.POCKET_DIR):
        classes.check_classes(prompts)


def fingerprint(folder):
    """A digest that tells one model or LoRA from another: names, sizes and 64 samples of each
    weight file in `folder`, so that it takes no time on large ones, and all configurations."""
    digest = hashlib.sha256()
    weights = weight_files(folder) or Path(folder).glob("*.safetensors")  # of a model, or a LoRA
    for file in sorted(weights) + sorted(Path(folder).glob("*/*.json")):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size}".encode())
        with open(file, "rb") as opened:
            for i in range(64):
                opened.seek(size * i // 64)
                digest.update(opened.read(4096))
    return digest.hexdigest()[:12]


def check_lora_dir(folder, flag="--lora_weights_dir"):
    """`folder` must hold the weights of a LoRA, whatever the file's name."""
    if Path(folder).is_file():
        raise UserError(f"{flag} {folder} is a file: give its folder, {Path(folder).parent}")
    files = list(Path(folder).glob("*.safetensors"))
    if not files:
        raise UserError(f"{flag} {folder}: no {LORA_FILE} there")
    for file in files:
        check_not_damaged(file, flag)
