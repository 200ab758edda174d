"""What checkpoints and previews cost the steps of a run, beside their own seconds.

    python tests/benchmarks/overhead.py

train.py on pocket with one worker, in turns: with neither, with a checkpoint every 16 steps, and
with two previews every 20. Printed are the seconds per step, from which those of the previews are
left out, and their ratio to the run with neither in the same turn.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import cache_model
from dreambooth import metrics, run_record
from dreambooth.cli import ArgumentParser
from dreambooth.pocket import render

PLAIN = "neither"
SIDES = {
    PLAIN: ["--checkpointing_steps", 0],
    "checkpoints": ["--checkpointing_steps", 16],
    "previews": [
        "--checkpointing_steps", 0, "--preview_every", 20,
        "--preview_prompts", "photo of unqtkn car in the snow", "photo of a car",
    ],
}  # fmt: skip


def seconds_of(folder, num_steps, flags):
    """Where the seconds of one run went, by phase."""
    output_dir = folder / "tuned"
    command = [
        sys.executable, "train.py", "--model_dir", cache_model.POCKET_DIR,
        "--output_dir", output_dir, "--instance_images_dir", folder / "instance",
        "--instance_prompt", "photo of unqtkn car", "--class_images_dir", folder / "class",
        "--class_prompt", "photo of a car", "--num_workers", 1, "--train_batch_size", 2,
        "--num_epochs", 1000, "--max_train_steps", num_steps, *flags,
    ]  # fmt: skip
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True, capture_output=True)
    return run_record.read(metrics.report_dir(output_dir))["seconds"]


def main(args):
    per_step = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        render.write_photos("lego_car", folder / "instance")
        render.write_photos("windmill", folder / "class")
        for _ in range(args.turns):
            for name, flags in SIDES.items():
                seconds = seconds_of(folder, args.steps, flags)
                per_step[name].append(seconds["steps_s"] / (args.steps - 1))
                own = {key: round(seconds[key], 1) for key in seconds if key != "loss"}
                ratio = per_step[name][-1] / per_step[PLAIN][-1]
                print(f"{name:>12} {per_step[name][-1]:.4f} s, {ratio:.3f} x", flush=True)
                print(f"    {json.dumps(own)}", flush=True)
    for name, values in per_step.items():
        print(f"{name:>12} best of {args.turns}: {min(values) / min(per_step[PLAIN]):.3f} x")


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    parser.add_argument("--steps", type=int, default=120, help="of each run")
    parser.add_argument("--turns", type=int, default=3, help="times each is run")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
