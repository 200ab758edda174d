"""Download a pinned revision of a diffusers model from the Hugging Face Hub into its cache layout.

    python cache_model.py --model_dir $ORIG_MODEL_DIR --model_name CompVis/stable-diffusion-v1-4 \\
        --revision b95be7d6f134c3a9e62ee616f310733567f069ce

The last line of the output names the pipeline directory,
$ORIG_MODEL_DIR/models--CompVis--stable-diffusion-v1-4/snapshots/<revision>. Only what the scripts
use is downloaded, as safetensors where the revision has them; complete downloads are not repeated.
The model "pocket" comes with this checkout: it needs no network.
"""

import shutil

from huggingface_hub import HfApi, snapshot_download

from dreambooth import atomic, hub, model_dir
from dreambooth.cli import ArgumentParser, UserError, absolute_path, run_main
from dreambooth.pocket.classes import POCKET_DIR

PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
WEIGHTS = {
    "text_encoder": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
}


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--model_dir", type=absolute_path, required=True, help="the cache, with a folder per model")
    add("--model_name", default="CompVis/stable-diffusion-v1-4", help='on the Hub, or "pocket"')
    add("--revision", default="main", help="commit, tag or branch")
    return parser.parse_args(argv)


def files_to_fetch(names):
    """Of a revision's file `names`, those that the scripts use: configurations, tokenizer, and for
    each model its float32 safetensors, or the pickle if there are none. Not the safety checker,
    half precision copies, flax, onnx or single-file checkpoints."""
    wanted = []
    for name in names:
        part, _, file = name.partition("/")
        is_text = file.endswith((".json", ".txt")) and not file.endswith(".index.json")
        if name == "model_index.json" or (part in PARTS and is_text):
            wanted.append(name)
    for part, safetensors in WEIGHTS.items():
        pickle = safetensors.replace(".safetensors", ".bin")
        if part == "text_encoder":
            pickle = "pytorch_model.bin"
        candidates = [f"{part}/{safetensors}", f"{part}/{pickle}"]
        present = [name for name in candidates if name in names]
        if not present:
            raise UserError(f"this revision has no {part} weights: it is not a diffusers model")
        wanted.append(present[0])
    return wanted


def fetch_from_hub(cache_dir, model_name, revision):
    """Download what is missing; returns the pipeline directory. UserError: no network, no such
    model or revision, or a licence to accept first."""
    snapshot = model_dir.snapshot_dir(cache_dir, model_name, revision)
    offline_remedy = (
        f"run this where there is one and copy the directory to {snapshot},"
        " or use --model_name pocket, which needs no network"
    )
    with hub.errors_as_one_line(model_name, revision, cache_dir, offline_remedy):
        info = HfApi().model_info(model_name, revision=revision)
        files = files_to_fetch([file.rfilename for file in info.siblings])
        return snapshot_download(
            model_name, revision=revision, cache_dir=cache_dir, allow_patterns=files
        )


def copy_pocket(snapshot):
    """Put the embedded model into the directory `snapshot`, unless it is there already."""
    is_complete = model_dir.missing_file(snapshot) is None
    if is_complete and model_dir.fingerprint(snapshot) == model_dir.fingerprint(POCKET_DIR):
        return
    atomic.replace_dir(
        snapshot, lambda folder: shutil.copytree(POCKET_DIR, folder, dirs_exist_ok=True)
    )


def main(args):
    atomic.check_writable(args.model_dir, "--model_dir")
    snapshot = model_dir.snapshot_dir(args.model_dir, args.model_name, args.revision)
    if args.model_name == "pocket":
        copy_pocket(snapshot)
    elif model_dir.missing_file(snapshot):  # always for a branch: its newest commit is asked for
        snapshot = fetch_from_hub(args.model_dir, args.model_name, args.revision)
    model_dir.check_model_dir(snapshot)
    print(snapshot)


if __name__ == "__main__":
    run_main(main, parse_args())
