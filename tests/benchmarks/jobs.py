"""Whole training jobs, from the command to the prompt, in turns: this project's, the published
example's, and diffusers'.

    python tests/benchmarks/jobs.py --steps 60 300 --diffusers_script PATH/train_dreambooth.py

Processes of their own, with 64 class images, once for each number of --steps: the published loop
without its report at every step, train.py with each of --workers, diffusers' script if
--diffusers_script names it, and in the first turn of all the published loop with its report.
(--skip_published leaves both out.) Ratios are to the first. The jobs' own lines say where the
seconds went.
"""

import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from dreambooth.cli import ArgumentParser
from dreambooth.files import pipeline_dir as directory
from dreambooth.pocket import render
from tests.benchmarks import published
from tests.benchmarks.published import PROMPTS, settings_for
from tests.benchmarks.throughput import pipeline_of

NUM_CLASS_IMAGES = 64


@dataclass
class JobFolders:
    """Where the jobs find the model, the photos and the class images, and where they write."""

    pipeline_dir: Path
    float32_dir: Path
    instance_dir: Path
    class_dir: Path
    output_dir: Path  # a folder in it for each job


def write_class_images(folder, resolution):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(NUM_CLASS_IMAGES):
        image = render.render(render.sample_scene(rng), rng)
        image.resize((resolution, resolution)).save(folder / f"{i}.png")


def write_in_float32(pipeline_dir, folder):
    """A copy of the pipeline with float32 weights, which diffusers' script insists on."""
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_dir, dtype=torch.float32)
    pipeline.save_pretrained(folder)


def our_command(script, folders, batch_size, num_steps):
    """The flags that train.py and published.py share."""
    return [
        script,
        "--model_dir", folders.pipeline_dir,
        "--instance_images_dir", folders.instance_dir,
        "--instance_prompt", PROMPTS[0],
        "--class_images_dir", folders.class_dir,
        "--class_prompt", PROMPTS[1],
        "--train_batch_size", batch_size,
        "--max_train_steps", num_steps,
    ]  # fmt: skip


def diffusers_command(script, folders, batch_size, num_steps):
    """diffusers' examples/dreambooth/train_dreambooth.py with the same work: its batch size counts
    pairs too."""
    resolution, _ = directory.resolution(folders.pipeline_dir)
    settings = settings_for(folders.pipeline_dir, "-")
    return [
        script,
        "--pretrained_model_name_or_path", folders.float32_dir,
        "--instance_data_dir", folders.instance_dir,
        "--instance_prompt", PROMPTS[0],
        "--class_data_dir", folders.class_dir,
        "--class_prompt", PROMPTS[1],
        "--with_prior_preservation",
        "--prior_loss_weight", settings.prior_loss_weight,
        "--num_class_images", NUM_CLASS_IMAGES,
        "--train_text_encoder",
        "--resolution", resolution,
        "--train_batch_size", batch_size,
        "--max_train_steps", num_steps,
        "--checkpointing_steps", num_steps + 1,  # none
        "--learning_rate", settings.lr,
        "--lr_warmup_steps", 0,
        "--mixed_precision", "bf16" if torch.cuda.is_available() else "no",
        "--seed", 0,
    ]  # fmt: skip


def list_jobs(args, folders, num_steps, with_report):
    """The command of each job by name: the base of the ratios first."""
    common = (folders, args.batch_size, num_steps)
    jobs = {}
    if not args.skip_published:
        jobs["published, without its report"] = [
            *our_command(published.__file__, *common),
            "--no_report",
        ]
    for n in args.workers:
        if n <= (torch.cuda.device_count() or 2):
            jobs[f"train.py, {n} worker{'s' if n > 1 else ''}"] = [
                *our_command(ROOT / "train.py", *common),
                "--num_workers", n,
            ]  # fmt: skip
    if args.diffusers_script:
        command = diffusers_command(args.diffusers_script, *common)
        jobs["diffusers' train_dreambooth.py"] = command
    if with_report and not args.skip_published:  # takes minutes
        jobs["published"] = our_command(published.__file__, *common)
    for name, command in jobs.items():
        command += ["--output_dir", folders.output_dir / name.replace(" ", "-")]
    return jobs


def run_job(name, command):
    """Run a job and print what its own lines say of speed and of where the seconds went.

    Returns its seconds from command to prompt, and its images per second, each None if unknown.
    """
    start = time.perf_counter()
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    lines = (done.stdout + done.stderr).splitlines()
    if done.returncode:
        print(f"{name:32} exit code {done.returncode} after {seconds:.1f} s: {lines[-1:]}")
        return None, None
    print(f"{name:32} {seconds:6.1f} s from command to prompt", flush=True)
    own_lines = [clean(line) for line in lines if re.search(r"images/s|save |Steps: 100%", line)]
    for line in list(dict.fromkeys(own_lines))[-2:]:
        print(f"    {line}", flush=True)
    rates = re.findall(r"([\d.]+) images/s", "\n".join(own_lines))
    return seconds, float(rates[-1]) if rates else None


def clean(line):
    """A line without terminal codes and without the prefix that Ray gives to a worker's lines."""
    line = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", line)
    return re.sub(r"^\(.*?pid=[^)]*\) ?", "", line).strip()


def compare_jobs(args, pipeline_dir, folder):
    """Print the seconds of each job in each turn, and its ratios to the base job in that turn."""
    resolution, _ = directory.resolution(pipeline_dir)
    folders = JobFolders(
        pipeline_dir=pipeline_dir,
        float32_dir=folder / "float32",
        instance_dir=ROOT / "images" / "lego-car",
        class_dir=folder / "class",
        output_dir=folder / "results",
    )
    write_class_images(folders.class_dir, resolution)
    if args.diffusers_script:
        write_in_float32(pipeline_dir, folders.float32_dir)
    for num_steps in args.steps:
        for turn in range(args.turns):
            print(f"jobs of {num_steps} steps, turn {turn + 1}", flush=True)
            with_report = turn == 0 and num_steps == args.steps[0]
            run_turn(list_jobs(args, folders, num_steps, with_report))


def run_turn(jobs):
    """Run each job once; then print its seconds and images per second with their ratios."""
    measured = {}
    for name, command in jobs.items():
        measured[name] = run_job(name, command)
    base_seconds, base_rate = next(iter(measured.values()))
    for name, (seconds, rate) in measured.items():
        columns = []
        if seconds and base_seconds:
            columns.append(f"{seconds:6.1f} s {base_seconds / seconds:5.2f} x")
        if rate and base_rate:
            columns.append(f"{rate:7.2f} images/s {rate / base_rate:5.2f} x")
        print(f"{name:32} {'  '.join(columns) or 'not measured'}", flush=True)


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        compare_jobs(args, pipeline_of(args.model, folder), Path(folder))


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--model", choices=["pocket", "sd14"], default="pocket", help="sd14 for a GPU")
    add("--batch_size", type=int, default=2, help="pairs per step and worker")
    add("--steps", type=int, nargs="+", default=[60], help="numbers of steps of the jobs")
    workers_help = "numbers of workers of train.py, as far as there are GPUs (2 on a CPU)"
    add("--workers", type=int, nargs="+", default=[1, 2, 4], help=workers_help)
    add("--turns", type=int, default=3, help="times each job is run")
    add("--skip_published", action="store_true", help="it takes minutes per job")
    diffusers_help = "also run diffusers' examples/dreambooth/train_dreambooth.py from there"
    add("--diffusers_script", metavar="PATH", help=diffusers_help)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
