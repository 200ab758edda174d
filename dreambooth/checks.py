"""What a user can get wrong, found before anything costly starts and said in one line.

Each script runs its `main` through `run_main`, which turns a `UserError` into that line on stderr
and exit code 2. A fault of ours keeps its stack trace.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

# What a pipeline directory must have: of each row, one file.
MODEL_FILES = [
    ("model_index.json",),
    ("scheduler/scheduler_config.json",),
    ("tokenizer/tokenizer.json", "tokenizer/merges.txt"),
    *((f"{part}/config.json",) for part in ("text_encoder", "vae", "unet")),
    ("text_encoder/model.safetensors", "text_encoder/pytorch_model.bin"),
    ("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin"),
    ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin"),
]


class UserError(ValueError):
    """Something that the user caused and can mend; the message says how."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help with the script's docstring as it stands, and with each default that says something."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def run_main(main, args):
    """Call `main(args)`; a `UserError` becomes one line and exit code 2, Ctrl-C exit code 130."""
    try:
        main(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def user_error_in(error):
    """The message of the `UserError` that `error` is, or that Ray has wrapped; None where there is none."""
    if type(error) is UserError:
        return str(error)
    _, found, message = str(error).rpartition(f"{UserError.__name__}: ")  # Ray's text holds the trace of the cause
    return message.splitlines()[0] if found else None


def check_at_least(args, minimum, *names, above=False):
    """Each of the named arguments that is given must be finite and at least `minimum`, with `above` more than that."""
    for name in names:
        value = getattr(args, name)
        if value is not None and (not minimum <= value < math.inf or (above and value == minimum)):  # nan is neither
            raise UserError(f"--{name} is {value}: it must be {'above' if above else 'at least'} {minimum}, and finite")


def missing_part(model_dir):
    """The first file of a diffusers pipeline that `model_dir` lacks; None where it is whole."""
    lacking = (names[0] for names in MODEL_FILES if not any((Path(model_dir) / name).exists() for name in names))
    return next(lacking, None)


def check_model_dir(model_dir, name="--model_dir"):
    """`model_dir` must be a diffusers pipeline directory; the message names what is missing."""
    if not Path(model_dir).is_dir():
        raise UserError(f"{name} {model_dir}: no such directory; fetch a model with cache_model.py first")
    if part := missing_part(model_dir):
        raise UserError(
            f"{name} {model_dir} is no diffusers pipeline directory: {part} is missing"
            " (cache_model.py prints the directory to give)"
        )
    for file in (Path(model_dir) / file for names in MODEL_FILES for file in names):
        check_whole(file, name)
    kind = json.loads((Path(model_dir) / "model_index.json").read_text()).get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise UserError(f"{name} {model_dir} is a {kind}; these scripts take Stable Diffusion 1.x and 2.x")
    prediction = json.loads((Path(model_dir) / MODEL_FILES[1][0]).read_text()).get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise UserError(f"{name} {model_dir} predicts {prediction}; epsilon and v_prediction are known")


def check_whole(file, name):
    """`file`, where it exists, must be JSON, or safetensors that are not cut off; their weights are not read."""
    try:
        if file.suffix == ".json" and file.exists():
            json.loads(file.read_text())
        if file.suffix == ".safetensors" and file.exists():
            with safe_open(file, "np"):
                pass
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{name}: {file} is damaged ({error}); fetch or copy it again") from None


def check_output_dir(output_dir, name="--output_dir"):
    """`output_dir` must be creatable and writable; nothing is left behind that was not there."""
    folder = Path(output_dir).absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{name} {folder} is a file: name a directory")
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"{name} {folder} cannot be written: {error.strerror or error}") from None


def check_prompt(tokenizer, prompt):
    """`prompt` must fit the tokenizer; the message quotes what would be cut off."""
    ids = tokenizer(prompt, verbose=False).input_ids
    longest = tokenizer.model_max_length
    if len(ids) > longest:
        lost = tokenizer.decode(ids[longest - 1 : -1]).strip()
        raise UserError(
            f"prompt too long: {prompt!r} has {len(ids)} tokens, the model takes {longest}; {lost!r} would be cut"
        )


def check_gpus(num_workers, num_gpus, num_cpus):
    """There must be a GPU for each worker where the cluster has any, else a CPU core for each."""
    have, what = (num_gpus, "GPU") if num_gpus else (num_cpus, "CPU core")
    if num_workers > have:
        plural = "s" if have != 1 else ""
        raise UserError(
            f"--num_workers {num_workers}: the cluster has {have} {what}{plural}, and each worker needs one;"
            f" give --num_workers {have} or less"
        )


def cores():
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def explain(error):
    """What a user can mend in a failed training, as a UserError; any other `error` is raised again."""
    for cause in getattr(error, "worker_failures", {}).values():
        if "torch.OutOfMemoryError" in f"{type(cause)} {cause}":
            return UserError(
                "out of GPU memory: give --gradient_checkpointing, --precision bf16, --use_lora,"
                " or a smaller --train_batch_size or --resolution"
            )
        if message := user_error_in(cause):
            return UserError(message)
    raise error
