"""When is a run done? Fidelity over its steps, beside what training itself can see at little cost.

    python tests/benchmarks/over_steps.py --work_dir DIR --subjects lego_car windmill

run.sh's recipe on pocket at a constant learning rate, judged every --every steps as by fidelity.py.
Beside the judge's metrics, a row has four signals that need no judge:

    instance      loss of the photos, always with the same noise and timesteps
    class         the same for class images
    distance      of the weights from the original model's, relative to their length
    change        of the images of the instance prompt since the last row, same noise (mean absolute
                  difference of pixels, 0 to 255)

The last lines give the rank correlation of each signal with each metric over the rows.
"""

import json
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from dreambooth import atomic, latents, models, saving
from dreambooth.cli import ArgumentParser, absolute_path
from dreambooth.images import crop_image, find_images
from dreambooth.loss import training_loss
from dreambooth.pocket import render
from dreambooth.training_plan import make_plan
from tests.benchmarks import fidelity
from tests.benchmarks import subjects as every_subject

METRICS = ("subject", "composition", "prior", "diversity", "others")
SIGNALS = ("instance", "class", "distance", "change")
FLAGS = "--train_batch_size 8 --lr 2e-4 --num_epochs 100"
FIXED_PAIRS = 40


class FixedLosses:
    """The losses of both halves on 40 pairs whose noise and timesteps are always the same."""

    def __init__(self, args, plan):
        device = torch.device("cpu")
        vae, denoiser, self.scheduler = models.load_models(args, device)
        self.start = [p.detach().clone() for p in denoiser.parameters()]
        photos, members = find_images(args.instance_images_dir), find_images(args.class_images_dir)
        paths = [photos[i % len(photos)] for i in range(FIXED_PAIRS)] + members[:FIXED_PAIRS]
        crops = np.stack([crop_image(str(path), plan.resolution, 0)[0] for path in paths])
        self.posteriors = latents.encode(vae, torch.from_numpy(crops / np.float32(127.5) - 1))
        positions = list(range(FIXED_PAIRS))
        shape = self.posteriors.shape[2:]
        self.noise = latents.sample_noise(args.seed + 1, positions, shape, device)
        num_timesteps = self.scheduler.config.num_train_timesteps
        self.timesteps = latents.sample_timesteps(args.seed + 1, positions, num_timesteps)
        self.prompt_ids = torch.tensor(plan.prompt_ids)

    @torch.no_grad()
    def __call__(self, denoiser):
        _, halves = training_loss(
            denoiser, self.scheduler, self.posteriors, self.prompt_ids, *self.noise,
            self.timesteps, 1.0,
        )  # fmt: skip
        return dict(zip(("instance", "class"), halves.tolist(), strict=True))

    @torch.no_grad()
    def distance(self, denoiser):
        """Of the weights from the start, relative to their length."""
        pairs = list(zip(denoiser.parameters(), self.start, strict=True))
        moved = sum((p - start).square().sum().item() for p, start in pairs)
        return (moved / sum(start.square().sum().item() for _, start in pairs)) ** 0.5


def follow(bench, name, seed, args):
    """Train one subject; returns a row for each time that it was judged."""
    flags = [*shlex.split(FLAGS), "--max_train_steps", args.steps]
    train_args = bench.train_args(name, seed, Path(args.work_dir) / "unused", flags)
    fixed = FixedLosses(train_args, make_plan(train_args))
    prompt = fidelity.instance_prompt(bench.judge(name).subject)
    rows = []
    images = bench.original(prompt).astype(float)

    def judge(step, denoiser):
        nonlocal images
        if (step + 1) % args.every:
            return
        with tempfile.TemporaryDirectory() as folder:
            tuned = Path(folder) / "tuned"
            saving.save_pipeline(denoiser, train_args.model_dir, tuned)
            sample = bench.sampler(tuned)
            metrics = bench.metrics(name, sample)
            before, images = images, sample(prompt).astype(float)
        signals = {**fixed(denoiser), "distance": fixed.distance(denoiser)}
        signals["change"] = np.abs(images - before).mean()
        rows.append({"subject_name": name, "step": step + 1, **metrics, **signals})
        print_row(rows[-1])
        atomic.append_line(Path(args.work_dir) / "over_steps.jsonl", json.dumps(rows[-1]))

    every_subject.train_here(train_args, judge)
    return rows


def print_row(row):
    shown = {key: value for key, value in row.items() if key not in ("subject_name", "step")}
    columns = [f"{key} {value:.3f}" for key, value in shown.items()]
    print(f"{row['subject_name']:>9} {row['step']:>4}  {'  '.join(columns)}", flush=True)


def print_correlations(rows):
    """Spearman's, of each signal with each metric, over all rows of all subjects."""
    table = pd.DataFrame(rows)
    ranks = table[[*METRICS, *SIGNALS]].rank()
    for signal in SIGNALS:
        row = {metric: ranks[signal].corr(ranks[metric]) for metric in METRICS}
        fidelity.print_row(signal, row)


def main(args):
    Path(args.work_dir).mkdir(parents=True, exist_ok=True)
    bench = every_subject.Bench(args)
    rows = [row for name in args.subjects for row in follow(bench, name, args.seed, args)]
    print_correlations(rows)


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--work_dir", type=absolute_path, required=True, help="for images and results")
    add("--model_dir", type=absolute_path, default=str(every_subject.POCKET), help="the original")
    add("--subjects", nargs="+", choices=list(render.SUBJECTS), default=["lego_car", "windmill"])
    add("--steps", type=int, default=600, help="of training")
    add("--every", type=int, default=50, help="steps between two rows")
    add("--seed", type=int, default=0, help="of train.py")
    add("--num_samples", type=int, default=24, help="images per prompt")
    add("--num_class_images", type=int, default=200, help="as in run.sh")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
