"""Fetch a pinned revision of a diffusers model from the Hugging Face Hub, in the Hub's cache layout.

    python cache_model.py --model_dir $ORIG_MODEL_DIR --model_name CompVis/stable-diffusion-v1-4 \\
        --revision b95be7d6f134c3a9e62ee616f310733567f069ce

The pipeline directory is $ORIG_MODEL_DIR/models--CompVis--stable-diffusion-v1-4/snapshots/<revision>;
the last line of the output names it. Only what the scripts use is fetched, as safetensors wherever
the revision has them, and what is already whole is not fetched again. The model "pocket" comes with
this checkout: it needs no network.
"""

import argparse
import errno
import os
import shutil
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dreambooth import checks
from dreambooth.pictures import fingerprint

POCKET_DIR = Path(__file__).parent / "dreambooth" / "pocket" / "model"
PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
WEIGHTS = {
    "text_encoder": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=checks.HelpFormatter)
    parser.add_argument("--model_dir", required=True, help="the cache: each model gets a directory in it")
    parser.add_argument("--model_name", default="CompVis/stable-diffusion-v1-4", help='on the Hub, or "pocket"')
    parser.add_argument("--revision", default="main", help="commit, tag or branch")
    return parser.parse_args(argv)


def files_to_fetch(names):
    """Of a revision's file `names`, those that the scripts use: configurations, tokenizer, and for
    each part with weights its float32 safetensors, or the pickle where there are none. Not the
    safety checker, half precision copies, flax, onnx or single-file checkpoints."""
    wanted = []
    for name in names:
        part, _, file = name.partition("/")
        plain = name == "model_index.json" or (part in PARTS and file.endswith((".json", ".txt")))
        if plain and not file.endswith(".index.json"):
            wanted.append(name)
    for part, safetensors in WEIGHTS.items():
        pickle = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
        present = [f"{part}/{file}" for file in (safetensors, pickle) if f"{part}/{file}" in names]
        if not present:
            raise checks.UserError(f"this revision has no {part} weights: it is no diffusers model")
        wanted.append(present[0])
    return wanted


def fetch_from_hub(model_dir, model_name, revision):
    """Download what is missing; returns the snapshot's directory. UserError: no network, no such
    model or revision, or a licence that has to be accepted first."""
    snapshot = Path(model_dir) / f"models--{model_name.replace('/', '--')}" / "snapshots" / revision
    try:
        info = HfApi().model_info(model_name, revision=revision)
        files = files_to_fetch([file.rfilename for file in info.siblings])
        return Path(snapshot_download(model_name, revision=revision, cache_dir=model_dir, allow_patterns=files))
    except GatedRepoError:
        raise checks.UserError(
            f"{model_name} asks for its licence to be accepted: do so on its page, then `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise checks.UserError(f"no model {model_name!r} on the Hub (or it is private: `hf auth login`)") from None
    except RevisionNotFoundError:
        raise checks.UserError(f"{model_name} has no revision {revision!r}") from None
    except HFValidationError as error:
        raise checks.UserError(f"--model_name {model_name!r}: {str(error).splitlines()[0]}") from None
    except PermissionError as error:
        raise checks.UserError(f"--model_dir {model_dir} cannot be written: {error}") from None
    except (OSError, HTTPError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise checks.UserError(f"no space left in --model_dir {model_dir}") from None
        raise checks.UserError(
            f"no answer from the Hub ({type(error).__name__}): check the network, or run this where there is one"
            f" and copy the directory to {snapshot}, or use --model_name pocket, which needs no network"
        ) from None


def copy_pocket(model_dir, revision):
    """Put the embedded model into the same layout; returns the snapshot's directory."""
    snapshot = Path(model_dir) / "models--pocket" / "snapshots" / revision
    if checks.missing_part(snapshot) or fingerprint(snapshot) != fingerprint(POCKET_DIR):
        temporary = snapshot.with_name(f".{snapshot.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(POCKET_DIR, temporary)
        shutil.rmtree(snapshot, ignore_errors=True)
        os.rename(temporary, snapshot)
    return snapshot


def main(args):
    checks.check_output_dir(args.model_dir, "--model_dir")
    if args.model_name == "pocket":
        snapshot = copy_pocket(args.model_dir, args.revision)
    else:
        snapshot = Path(args.model_dir) / f"models--{args.model_name.replace('/', '--')}" / "snapshots" / args.revision
        if checks.missing_part(snapshot):  # so it is for a branch, whose newest commit is asked for each time
            snapshot = fetch_from_hub(args.model_dir, args.model_name, args.revision)
    checks.check_model_dir(snapshot)
    print(snapshot)


if __name__ == "__main__":
    checks.run_main(main, parse_args())
