"""Images per second: generate.py's ImageGenerator against the plain loop of the published example.

    python tests/benchmarks/generation.py --model_dir $ORIG_MODEL_PATH

The plain loop calls the pipeline for one image at a time, with 50 steps of the model's own
scheduler. All sides take turns in one process, so that a busy machine slows them alike; the ratios
are what counts. After that, generate.py as a command: without Ray, again (nothing is missing), and
with Ray on one and two workers.
"""

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
from dreambooth.cli import ArgumentParser, silence_model_libraries
from dreambooth.image_generator import ImageGenerator
from dreambooth.machines.device import num_cores

PROMPT = "photo of a car"


class PlainLoop:
    """Generates `num_images` images one at a time, as the published example does."""

    def __init__(self, model_dir, num_images, num_inference_steps):
        on_gpu = torch.cuda.is_available()
        dtype = torch.float16 if on_gpu else torch.float32
        pipeline = StableDiffusionPipeline.from_pretrained(
            model_dir, dtype=dtype, safety_checker=None
        )
        self.pipeline = pipeline.to("cuda" if on_gpu else "cpu")
        self.pipeline.set_progress_bar_config(disable=True)
        self.num_images = num_images
        self.num_inference_steps = num_inference_steps

    def run(self, folder):
        for i in range(self.num_images):
            output = self.pipeline(
                PROMPT, num_inference_steps=self.num_inference_steps, guidance_scale=7.5
            )
            output.images[0].save(folder / f"{i}.png")


class Ours:
    """Generates `num_images` images with generate.py's ImageGenerator and its default settings, but
    for `flags`."""

    def __init__(self, model_dir, num_images, *flags):
        argv = ["--model_dir", model_dir, "--output_dir", ".", "--prompts", PROMPT]
        argv += ["--num_samples_per_prompt", str(num_images), *flags]
        args = generate.parse_args(argv)
        self.num_images = num_images
        self.generator = ImageGenerator(args)
        self.records = generate.list_records(args)

    def run(self, folder):
        self.generator.folder = folder
        for _ in self.generator.generate(self.records):
            pass


def time_run(side):
    """Seconds of one run."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        side.run(Path(folder))
        return time.perf_counter() - start


def compare_in_process(args):
    """Print the images per second of each side, and its ratio to the plain loop."""
    model_steps = ["--scheduler", "model", "--num_inference_steps", "50"]
    plain = "plain loop, 50 steps of the model's scheduler"
    sides = {
        plain: PlainLoop(args.model_dir, args.num_images // 4, 50),
        "ours, 50 steps of the model's scheduler": Ours(
            args.model_dir, args.num_images, *model_steps
        ),
        "ours, defaults (25 steps of DPM-Solver++)": Ours(args.model_dir, args.num_images),
    }
    for side in sides.values():  # warm up
        time_run(side)
    rates = {name: [] for name in sides}
    for _ in range(args.turns):
        for name, side in sides.items():
            rates[name].append(side.num_images / time_run(side))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        print(f"{name:48} {rate:7.3f} images/s  {rate / medians[plain]:6.2f} x", flush=True)


def compare_commands(args):
    """Print the seconds of generate.py as a command, start-up included."""
    num_images = 4 * args.num_images
    runs = [("without Ray", "local", []), ("again", "local", [])]
    for n in (1, 2, 4):
        if n <= (torch.cuda.device_count() or 2):
            flags = ["--use_ray_data", "--num_workers", str(n)]
            runs.append((f"{n} worker(s)", f"ray-{n}", flags))
    with tempfile.TemporaryDirectory() as folder:
        for name, output_dir, flags in runs:
            command = [sys.executable, ROOT / "generate.py", "--model_dir", args.model_dir]
            command += ["--output_dir", Path(folder) / output_dir, "--prompts", PROMPT]
            command += ["--num_samples_per_prompt", str(num_images), *flags]
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds = time.perf_counter() - start
            print(f"generate.py, {num_images} images, {name:12} {seconds:6.1f} s", flush=True)


def main(args):
    silence_model_libraries()
    torch.set_num_threads(num_cores())
    compare_in_process(args)
    compare_commands(args)


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    parser.add_argument("--model_dir", required=True, help="a pipeline directory")
    parser.add_argument(
        "--num_images", type=int, default=16, help="images per turn; a quarter for the plain loop"
    )
    parser.add_argument("--turns", type=int, default=3, help="turns measured, after a warm-up")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
