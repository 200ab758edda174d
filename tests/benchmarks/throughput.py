"""Training speed and memory: this project's step and job against the published example's, as ratios
within one run.

    python tests/benchmarks/throughput.py --model pocket           # steps, then whole jobs on Ray
    python tests/benchmarks/throughput.py --model sd14 --no_ray    # on a GPU; Ray may be missing
    python tests/benchmarks/throughput.py --model sd14 --count     # on any machine: memory and
                                                                   # arithmetic of a step

"sd14" is Stable Diffusion 1.4's architecture with random weights.

Steps: each side trains its own copy of the model. On a CPU the sides take turns, so that a busy
machine slows them alike; on a GPU one side at a time is in memory. "plain" is the published step:
bfloat16 weights and noise schedule, VAE and text encoder at every step. The sides below "ours" have
one of its features switched off or an option on.

Jobs: from the command to the prompt, processes of their own, in turns, with 64 class images, once
for each number of --job_steps: the published loop without its report at every step, train.py with
1, 2 and (on four GPUs) 4 workers, diffusers' own train_dreambooth.py if --diffusers_script names
it, and in the first turn of all the published loop with its report. (--skip_published leaves both
out.) Ratios are to the first. The jobs' own lines say where the seconds went.
"""

import functools
import gc
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks import published  # may stand in for Ray: before its users
from tests.benchmarks.counting import GIB, META, count_gib, count_tflop, without_weights
from tests.benchmarks.published import PROMPTS, Plain, settings_for, tokenize_prompts

# isort: split
import cache_model
from dreambooth import cluster, latents, logs, model_dir, models
from dreambooth.cli import ArgumentParser
from dreambooth.loss import training_loss
from dreambooth.pocket import pretrain, render

NUM_CLASS_IMAGES = 64
FEATURES = ["cached latents", "prompts encoded once"]
GPU_FEATURES = ["channels_last", "fused AdamW"]
OPTIONS = [
    ["--gradient_checkpointing"],
    ["--param_dtype=bf16"],
    ["--param_dtype=bf16", "--gradient_checkpointing"],
    ["--use_lora"],
    ["--use_lora", "--gradient_checkpointing"],
]


def new_sd14_models():
    """VAE, text encoder and U-Net of Stable Diffusion 1.4's architecture, with random weights: 84,
    123 and 860 M."""
    text_config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    text_encoder = CLIPTextModel(text_config)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    vae = AutoencoderKL(
        sample_size=512,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    return vae, text_encoder, unet


def build_sd14(folder):
    """Write a pipeline directory with `new_sd14_models`. The tokenizer is pocket's, padded to 77
    tokens."""
    torch.manual_seed(0)
    tokenizer = model_dir.load_tokenizer(cache_model.POCKET_DIR)
    tokenizer.model_max_length = 77
    pretrain.export(tokenizer, *new_sd14_models(), folder)
    return folder


class Ours:
    """The step of train.py, with some of its features switched off by name.

    With `keep_gradients` their memory is held from step to step, as DDP's buckets are.
    """

    keep_gradients = False

    def __init__(self, settings, pixels, prompt_ids, device, off=(), autocast=None):
        self.settings = settings
        self.vae, self.denoiser, self.scheduler = models.load_models(settings, device, autocast)
        if "channels_last" in off:
            self.denoiser.unet.to(memory_format=torch.contiguous_format)
        self.parameters = [p for p in self.denoiser.parameters() if p.requires_grad]
        self.optimizer = models.build_optimizer(self.parameters, settings)
        if "fused AdamW" in off:
            self.optimizer = torch.optim.AdamW(self.parameters, settings.lr)
        num_pairs = len(pixels) // 2
        self.positions = list(range(num_pairs))
        self.prompt_ids = prompt_ids.to(device)
        if "prompts encoded once" in off:
            self.prompt_ids = self.prompt_ids.repeat_interleave(num_pairs, 0)
        self.pixels = pixels.to(device)
        self.posteriors = latents.encode(self.vae, self.pixels)
        self.encode_each_step = "cached latents" in off

    def step(self):
        for _ in range(self.settings.gradient_accumulation_steps):
            self.forward_backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)

    def forward_backward(self):
        if self.encode_each_step:
            self.posteriors = latents.encode(self.vae, self.pixels)
        posteriors = self.posteriors
        posterior_noise, noise = latents.sample_noise(
            0, self.positions, posteriors.shape[2:], posteriors.device
        )
        timesteps = latents.sample_timesteps(0, self.positions, 1000)
        timesteps = timesteps.to(posteriors.device, non_blocking=True)
        loss, _ = training_loss(
            self.denoiser, self.scheduler, posteriors, self.prompt_ids, posterior_noise, noise,
            timesteps, 1.0,
        )  # fmt: skip
        loss.backward()


def build_inputs(args, pipeline_dir, device):
    """What both sides take: the pixels of a batch, the two prompts, and the device."""
    resolution, _ = model_dir.resolution(pipeline_dir)
    pixels = torch.rand(2 * args.batch_size, 3, resolution, resolution) * 2 - 1
    return pixels, tokenize_prompts(pipeline_dir), device


def list_sides(args, pipeline_dir, device):
    """By name, what builds each side: "plain", "ours", ours without a feature, ours with an
    option."""
    inputs = build_inputs(args, pipeline_dir, device)
    settings = settings_for(pipeline_dir, "-")
    build_ours = functools.partial(Ours, settings, *inputs)
    sides = {"plain": functools.partial(Plain, settings, *inputs), "ours": build_ours}
    on_gpu = device.type == "cuda"
    for feature in FEATURES + (GPU_FEATURES if on_gpu else []):
        sides[f"ours without {feature}"] = functools.partial(build_ours, off=(feature,))
    if not on_gpu:
        sides["ours with bfloat16 autocast"] = functools.partial(build_ours, autocast=True)
    for flags in OPTIONS + ([["--compile"]] if args.compile else []):
        option_settings = settings_for(pipeline_dir, "-", *flags)
        sides[f"ours {' '.join(flags)}"] = functools.partial(Ours, option_settings, *inputs)
    return sides


@dataclass
class Timing:
    """Seconds of a side's first step, seconds per step of each turn, and on a GPU its peak
    memory."""

    first: float
    turns: list = field(default_factory=list)
    peak_gib: float | None = None

    @property
    def median(self):
        return statistics.median(self.turns)


def time_steps(side, num_steps, device):
    """Seconds per step."""
    start = time.perf_counter()
    for _ in range(num_steps):
        side.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / num_steps


def time_in_turns(builders, args, device):
    """Build sides, time them in turns, and let go of them; returns a Timing for each by name."""
    sides = {name: build() for name, build in builders.items()}
    timings = {name: Timing(time_steps(side, 1, device)) for name, side in sides.items()}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(args.turns):
        for name, side in sides.items():
            timings[name].turns.append(time_steps(side, args.steps, device))
    if device.type == "cuda":
        for timing in timings.values():  # of one side: there is only one at a time
            timing.peak_gib = torch.cuda.max_memory_allocated() / GIB
    if "ours" in sides:
        print_arithmetic(sides["ours"], timings["ours"].median, device)
    return timings


def compare_steps(args, pipeline_dir, device):
    """Print for each side: seconds of the first step, seconds per step, images per second, the
    ratio to "plain", and on a GPU its peak memory."""
    builders = list_sides(args, pipeline_dir, device)
    groups = [builders]
    if device.type == "cuda":
        groups = [{name: build} for name, build in builders.items()]
    timings = {}
    for group in groups:
        timings |= time_in_turns(group, args, device)
        # Its sides are out of scope now: free them before the next one is built.
        gc.collect()
        torch.cuda.empty_cache()
    for name, timing in timings.items():
        rate = 2 * args.batch_size / timing.median
        ratio = timings["plain"].median / timing.median
        peak = f"  peak {timing.peak_gib:5.2f} GiB" if timing.peak_gib else ""
        print(
            f"{name:50} first {timing.first:5.1f} s, then {timing.median:6.3f} s per step"
            f" {rate:7.1f} images/s {ratio:5.2f} x{peak}",
            flush=True,
        )
    if args.compile:
        print_gain_of_compile(timings["ours"], timings["ours --compile"])


def print_gain_of_compile(eager, compiled):
    extra = compiled.first - eager.first
    gain = eager.median - compiled.median
    pays = f"pays from {extra / gain:.0f} steps on" if gain > 0 else "never pays"
    print(f"--compile: {extra:.1f} s once, {gain:.3f} s saved per step: {pays}")


class MatrixProduct:
    """A step that is one large matrix product."""

    def __init__(self, n, device, dtype):
        self.a = torch.randn(n, n, device=device, dtype=dtype)
        self.b = torch.randn(n, n, device=device, dtype=dtype)

    def step(self):
        self.a @ self.b


def print_arithmetic(side, seconds, device):
    """The floating point operations of a step, and its rate as a share of a large matrix
    product's."""
    with FlopCounterMode(display=False) as counter:
        side.step()
    flops = counter.get_total_flops()
    n = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if side.denoiser.autocast else torch.float32
    product = MatrixProduct(n, device, dtype)
    time_steps(product, 3, device)
    attainable = 2 * n**3 / time_steps(product, 10, device)
    achieved = flops / seconds
    print(
        f"ours: {flops / 1e12:.3f} TFLOP per step, {achieved / 1e12:.2f} TFLOP/s,"
        f" {achieved / attainable:.0%} of the {attainable / 1e12:.2f} TFLOP/s of a large matrix"
        f" product in {dtype}"
    )


def sd14_side(flags, num_pairs=2, off=()):
    """Our side with `flags` and Stable Diffusion 1.4, on the meta device: for counting."""
    settings = settings_for(cache_model.POCKET_DIR, "-", *flags)  # its noise schedule is the same
    pixels = torch.empty(2 * num_pairs, 3, 512, 512, device=META)
    prompt_ids = torch.empty(2, 77, dtype=torch.long, device=META)
    with without_weights(new_sd14_models):
        return Ours(settings, pixels, prompt_ids, META, off=off, autocast=True)


def count_steps(num_pairs):
    """Print the arithmetic of our step, and the memory that it takes on a single GPU and on each of
    several: the numbers of dreambooth/memory.py and RESULTS.md."""
    cases = [(flags, ()) for flags in [[], *OPTIONS, ["--gradient_accumulation_steps=2"]]]
    cases.append(([], FEATURES))
    for flags, off in cases:
        side = sd14_side(flags, num_pairs, off)
        tflop = count_tflop(side)
        alone = count_gib(side, keep_gradients=False)
        several = count_gib(side, keep_gradients=True)
        name = " ".join(["ours", *flags])
        if off:
            name += f" without {' and '.join(off)}"
        print(
            f"{name:56} {tflop:6.2f} TFLOP, {alone:5.1f} GiB,"
            f" on each of several GPUs {several:5.1f} GiB",
            flush=True,
        )


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
    resolution, _ = model_dir.resolution(folders.pipeline_dir)
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
    for n in (1, 2, 4):
        if n <= (torch.cuda.device_count() or 2):
            num_epochs = math.ceil(num_steps * args.batch_size * n / NUM_CLASS_IMAGES)
            jobs[f"train.py, {n} worker{'s' if n > 1 else ''}"] = [
                *our_command(ROOT / "train.py", *common),
                "--num_workers", n,
                "--num_epochs", num_epochs,
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
    resolution, _ = model_dir.resolution(pipeline_dir)
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
    for num_steps in args.job_steps:
        for turn in range(args.job_turns):
            print(f"jobs of {num_steps} steps, turn {turn + 1}", flush=True)
            with_report = turn == 0 and num_steps == args.job_steps[0]
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
    if args.count:
        count_steps(args.batch_size)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(cluster.num_cores())
    torch.set_float32_matmul_precision("high")  # as in train.py
    logs.hide_progress_bars(verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        pipeline_dir = cache_model.POCKET_DIR
        if args.model == "sd14":
            pipeline_dir = build_sd14(folder / "sd14")
        if not args.jobs_only:
            compare_steps(args, pipeline_dir, device)
        if not args.no_ray:
            compare_jobs(args, pipeline_dir, folder)


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--model", choices=["pocket", "sd14"], default="pocket", help="sd14 for a GPU"
    )
    parser.add_argument("--batch_size", type=int, default=2, help="pairs per step and worker")
    parser.add_argument(
        "--count",
        action="store_true",
        help="count memory and arithmetic of a step of sd14, on any machine, and time nothing",
    )

    group = parser.add_argument_group("steps")
    group.add_argument("--no_ray", action="store_true", help="steps alone, no jobs")
    group.add_argument(
        "--compile", action="store_true", help="time --compile too, and print when it pays"
    )
    group.add_argument("--steps", type=int, default=5, help="steps per turn")
    group.add_argument("--turns", type=int, default=5, help="turns measured")

    group = parser.add_argument_group("jobs")
    group.add_argument("--jobs_only", action="store_true", help="jobs alone, no steps")
    group.add_argument(
        "--job_steps", type=int, nargs="+", default=[60], help="numbers of steps of the jobs"
    )
    group.add_argument("--job_turns", type=int, default=3, help="times each job is run")
    group.add_argument("--skip_published", action="store_true", help="it takes minutes per job")
    group.add_argument(
        "--diffusers_script",
        metavar="PATH",
        help="also run diffusers' examples/dreambooth/train_dreambooth.py from there",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
