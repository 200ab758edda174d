"""Pictures a second: generate.py's painter against the plain loop of the published example.

    python tests/benchmarks/generation.py --model_dir $ORIG_MODEL_PATH

The plain loop calls the pipeline for one picture at a time, with 50 steps of the model's own
scheduler. Both sides alternate in one process, so a busy machine slows them alike; the ratios are
what counts. After that, generate.py as a command: without Ray, again (nothing is left to make), and with
Ray on one and two workers.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import generate
from dreambooth import checks, models

PROMPT = "photo of a car"


def plain_loop(model_dir, count, steps):
    """Returns a function that makes `count` pictures as the published example does."""
    on_gpu = torch.cuda.is_available()
    dtype = torch.float16 if on_gpu else torch.float32
    pipeline = StableDiffusionPipeline.from_pretrained(model_dir, dtype=dtype, safety_checker=None)
    pipeline = pipeline.to("cuda" if on_gpu else "cpu")
    pipeline.set_progress_bar_config(disable=True)

    def run(folder):
        for i in range(count):
            pipeline(PROMPT, num_inference_steps=steps, guidance_scale=7.5).images[0].save(f"{folder}/{i}.png")

    return run


def ours(model_dir, count, *flags):
    """Returns a function that makes `count` pictures with generate.py's painter."""
    args = generate.parse_args(
        [
            "--model_dir",
            model_dir,
            "--output_dir",
            ".",
            "--prompts",
            PROMPT,
            "--num_samples_per_prompt",
            str(count),
            *flags,
        ]
    )
    painter, planned = generate.Painter(args), generate.plan(args)

    def run(folder):
        painter.folder = Path(folder)
        list(painter.paint(planned))

    return run


def seconds(run):
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run(folder)
        return time.perf_counter() - start


def main(args):
    models.quiet()
    torch.set_num_threads(checks.cores())
    few, many = args.num_pictures // 4, args.num_pictures
    sides = {
        "plain loop, 50 steps of the model's scheduler": (few, plain_loop(args.model_dir, few, 50)),
        "ours, 50 steps of the model's scheduler": (
            many,
            ours(args.model_dir, many, "--scheduler", "model", "--num_inference_steps", "50"),
        ),
        "ours, defaults (25 steps of DPM-Solver++)": (many, ours(args.model_dir, many)),
    }
    rates = {name: [] for name in sides}
    for turn in range(args.turns + 1):
        for name, (count, run) in sides.items():
            rate = count / seconds(run)
            if turn:  # the first turn warms up
                rates[name].append(rate)
    plain = statistics.median(next(iter(rates.values())))
    for name, values in rates.items():
        middle = statistics.median(values)
        print(f"{name:48} {middle:7.3f} pictures/s  {middle / plain:6.2f} x")
    compare_commands(args)


def compare_commands(args):
    """Print the seconds of generate.py as a command, start-up included."""
    workers = [n for n in (1, 2, 4) if n <= (torch.cuda.device_count() or 2)]
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in [
            ("alone", []),
            ("again", []),
            *((f"ray-{n}", ["--use_ray_data", "--num_workers", n]) for n in workers),
        ]:
            output_dir = Path(folder) / name.replace("again", "alone")
            command = [sys.executable, ROOT / "generate.py", "--model_dir", args.model_dir, "--output_dir", output_dir]
            command += ["--prompts", PROMPT, "--num_samples_per_prompt", 4 * args.num_pictures, *flags]
            start = time.perf_counter()
            subprocess.run(list(map(str, command)), check=True, capture_output=True)
            print(f"generate.py, {4 * args.num_pictures} pictures, {name:6} {time.perf_counter() - start:6.1f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=checks.HelpFormatter)
    parser.add_argument("--model_dir", required=True, help="a pipeline directory")
    parser.add_argument("--num_pictures", type=int, default=16, help="pictures a turn; the plain loop makes a quarter")
    parser.add_argument("--turns", type=int, default=3, help="turns measured, after one that warms up")
    main(parser.parse_args())
