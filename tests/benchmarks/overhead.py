"""What checkpoints and previews cost the steps of a run, beside their own seconds.

    python tests/benchmarks/overhead.py

train.py on pocket, once with a checkpoint and once with two previews every 20 steps. Within each
run, the 10 steps after one are compared with the 10 steps before the next: by then a checkpoint is
written, and what a preview has left in caches is gone. The first of the 10 waits for a checkpoint's
copy to memory; the seconds of the previews themselves are counted apart.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import cache_model
import train
from dreambooth.cli import ArgumentParser
from dreambooth.pocket import render
from dreambooth.report import Report

EVERY = 20
SIDES = {
    "checkpoints": ["--checkpointing_steps", EVERY],
    "previews": [
        "--checkpointing_steps", 0, "--preview_every", EVERY,
        "--preview_prompts", "photo of unqtkn car in the snow", "photo of a car",
    ],
}  # fmt: skip


class TimedReport(Report):
    """A Report that keeps the seconds of each step."""

    ends = []

    def step_is_done(self, step, *args):
        super().step_is_done(step, *args)
        self.ends.append(time.perf_counter() - self.metrics.get("previews_s", 0.0))


def step_seconds(folder, name, num_steps):
    """The seconds of each step of one run but the first, without those of its previews."""
    argv = [
        "--model_dir", cache_model.POCKET_DIR, "--output_dir", folder / name,
        "--instance_images_dir", folder / "instance", "--class_images_dir", folder / "class",
        "--instance_prompt", "photo of unqtkn car", "--class_prompt", "photo of a car",
        "--num_workers", 1, "--train_batch_size", 2, "--num_epochs", 1000,
        "--max_train_steps", num_steps, *SIDES[name],
    ]  # fmt: skip
    TimedReport.ends = []
    train.main(train.parse_args([str(word) for word in argv]))
    return [end - start for start, end in zip(TimedReport.ends, TimedReport.ends[1:], strict=False)]


def main(args):
    train.Report = TimedReport
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        render.write_photos("lego_car", folder / "instance")
        render.write_photos("windmill", folder / "class")
        for name in SIDES:
            # seconds[i] is of step i + 2; the first EVERY steps come before the first checkpoint.
            seconds = step_seconds(folder, name, args.steps)[EVERY - 1 :]
            after = [s for i, s in enumerate(seconds) if i % EVERY < EVERY // 2]
            before = [s for i, s in enumerate(seconds) if i % EVERY >= EVERY // 2]
            ratio = statistics.mean(after) / statistics.mean(before)
            print(f"{name}: {statistics.mean(before):.3f} s per step, after one {ratio:.3f} x")


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    parser.add_argument("--steps", type=int, default=200, help="of each run")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
