"""Training speed and memory: this project's step and job against the published example's, ratios within one run.

    python tests/benchmarks/throughput.py --model pocket              # steps alone, then whole jobs on Ray
    python tests/benchmarks/throughput.py --model sd14 --no_ray       # Stable Diffusion 1.4's architecture at
                                                                      # random weights, for a GPU; Ray may be missing
    python tests/benchmarks/throughput.py --model sd14 --count        # memory and arithmetic of its step, anywhere

Steps: each side trains its own copy of the model; the sides take turns, so that a busy machine slows
them alike. "plain" is the published loop: bfloat16 weights and noise schedule, VAE and text encoder
live at every step. The sides below "ours" have one of its features switched off or an option on.

Jobs: 60 steps, 64 class images, start to saved model, as processes of their own, in turns: train.py with 1, 2
(and on four GPUs 4) workers, and the published loop without its report at every step and, once, with it. Their
own lines say where the seconds went.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import cache_model
from dreambooth import checks, files, latents, models
from dreambooth.loss import training_loss
from dreambooth.pocket import pretrain, render
from tests.benchmarks import published
from tests.benchmarks.published import PROMPTS, Plain, settings_for


def build_sd14(folder):
    """Write a pipeline directory with Stable Diffusion 1.4's architecture and random weights: 860 M
    U-Net, 123 M text encoder, 84 M VAE; a tokenizer of pocket's, filled up to 77 tokens."""
    torch.manual_seed(0)
    tokenizer = files.load_tokenizer(cache_model.POCKET_DIR)
    tokenizer.model_max_length = 77
    text_encoder = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    vae = AutoencoderKL(
        sample_size=512, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    pretrain.export(tokenizer, vae, text_encoder, unet, folder)
    return folder


class Ours:
    """The step of train.py, with some of its features switched off by name. With `keep_gradients` their memory is
    held from step to step, as DDP's buckets are."""

    keep_gradients = False

    def __init__(self, settings, pixels, prompt_ids, device, off=(), autocast=None):
        self.settings = settings
        vae, self.denoiser, self.scheduler = models.load_models(settings, device, autocast)
        if "channels_last" in off:
            self.denoiser.unet.to(memory_format=torch.contiguous_format)
        self.parameters = [p for p in self.denoiser.parameters() if p.requires_grad]
        self.optimizer = models.build_optimizer(self.parameters, settings)
        if "fused AdamW" in off:
            self.optimizer = torch.optim.AdamW(self.parameters, settings.lr)
        self.batch = {"prompt_ids": prompt_ids.to(device), "positions": list(range(len(pixels) // 2))}
        if "prompts encoded once" in off:
            self.batch["prompt_ids"] = self.batch["prompt_ids"].repeat_interleave(len(pixels) // 2, 0)
        self.batch["posteriors"] = latents.encode(vae, pixels.to(device))
        self.live = (vae, pixels.to(device)) if "cached latents" in off else None

    def step(self):
        if self.live:
            self.batch["posteriors"] = latents.encode(*self.live)
        draws = latents.draw(0, self.batch, 1000)
        training_loss(self.denoiser, self.scheduler, self.batch, draws, 1.0).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and their peak."""

    def __init__(self, tensors):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()
        self.add(tensors)

    def add(self, tensors):
        for tensor in (leaf for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor)):
            storage = tensor.untyped_storage()
            if id(storage) not in self.known:
                self.known.add(id(storage))
                self.now += (size := storage.nbytes())
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.drop, id(storage), size)

    def drop(self, key, size):
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.add(out := func(*args, **(kwargs or {})))
        return out


def in_float32(function):
    """`function` as CUDA's autocast runs it, which computes norms and interpolation in float32; a CPU's does not."""

    def run(*args, **kwargs):
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
        return function(*args, **kwargs)

    return run


def count_step(side):
    """Of a step of one of our sides: its TFLOP, and at its peak the GiB of weights, gradients, optimizer and
    activations on the only GPU and on each of several. Counted on fake tensors, which have sizes and no numbers: no
    GPU is needed. What a GPU's libraries take for themselves comes on top, 1 to 2 GiB."""
    denoiser, peaks = side.denoiser, []
    as_on_cuda = {name: in_float32(getattr(F, name)) for name in ("group_norm", "layer_norm", "interpolate")}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, patch.multiple(F, **as_on_cuda):
        fakes = {name: mode.from_tensor(p) for name, p in [*denoiser.named_parameters(), *denoiser.named_buffers()]}
        side.denoiser = lambda *inputs: functional_call(denoiser, fakes, inputs)
        side.parameters = [p for p in fakes.values() if p.requires_grad]
        side.batch = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in side.batch.items()}
        for keep in (False, True):
            side.keep_gradients = keep
            side.optimizer = models.build_optimizer(side.parameters, side.settings)
            with LiveBytes(fakes) as counter:
                side.step()
                counter.peak = counter.now
                side.step()
            peaks.append(counter.peak / 2**30)
        with FlopCounterMode(display=False) as flops:
            side.step()
    return flops.get_total_flops() / 1e12, *peaks


FEATURES = ["cached latents", "prompts encoded once"]
OPTIONS = [
    ["--gradient_checkpointing"], ["--precision=bf16"], ["--precision=bf16", "--gradient_checkpointing"],
    ["--use_lora"], ["--use_lora", "--gradient_checkpointing"],
]  # fmt: skip


def build_inputs(args, model_dir, device):
    """The pixels of a batch, the two prompts, and the device."""
    resolution, _ = files.model_resolution(model_dir)
    tokenizer = files.load_tokenizer(model_dir)
    ids = tokenizer(list(PROMPTS), padding="max_length", max_length=tokenizer.model_max_length).input_ids
    return torch.rand(2 * args.batch_size, 3, resolution, resolution) * 2 - 1, torch.tensor(ids), device


def list_sides(args, model_dir, device):
    """By name, how to build each side: "plain", "ours", ours without one of its features, ours with an option."""
    settings, inputs = settings_for(model_dir, "-"), build_inputs(args, model_dir, device)
    on_gpu = device.type == "cuda"
    features = [*FEATURES, "channels_last", "fused AdamW"] if on_gpu else FEATURES
    options = OPTIONS + ([["--compile"]] if args.compile else [])
    return {
        "plain": lambda: Plain(settings, *inputs),
        "ours": lambda: Ours(settings, *inputs),
        **{f"ours without {name}": lambda name=name: Ours(settings, *inputs, off=(name,)) for name in features},
        **({} if on_gpu else {"ours with bfloat16 autocast": lambda: Ours(settings, *inputs, autocast=True)}),
        **{f"ours {' '.join(flags)}": lambda flags=flags: Ours(settings_for(model_dir, "-", *flags), *inputs)
           for flags in options},
    }  # fmt: skip


def compare_steps(args, model_dir, device):
    """Print for each side: seconds of the first step, seconds a step, images/s, the ratio to "plain"; on a GPU its
    peak memory. There one side at a time has room; on a CPU they alternate."""
    sides, seconds, first, peaks = list_sides(args, model_dir, device), {}, {}, {}
    on_gpu = device.type == "cuda"
    for group in [[name] for name in sides] if on_gpu else [list(sides)]:
        built = {name: sides[name]() for name in group}
        first |= {name: time_steps(side, 1, device) for name, side in built.items()}
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(args.turns):
            for name, side in built.items():
                seconds.setdefault(name, []).append(time_steps(side, args.steps, device))
        if on_gpu:
            peaks[group[0]] = torch.cuda.max_memory_allocated() / 2**30
        if "ours" in group:
            print_arithmetic(built["ours"], seconds["ours"], device)
        built.clear()
        torch.cuda.empty_cache()
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in middle.items():
        rate = f"{2 * args.batch_size / value:7.1f} images/s {middle['plain'] / value:5.2f} x"
        peak = f"  peak {peaks[name]:5.2f} GiB" if name in peaks else ""
        print(f"{name:50} first {first[name]:5.1f} s, then {value:6.3f} s a step {rate}{peak}", flush=True)
    if args.compile:
        extra = first["ours --compile"] - first["ours"]
        gain = middle["ours"] - middle["ours --compile"]
        pays = f"pays from {extra / gain:.0f} steps on" if gain > 0 else "never pays"
        print(f"--compile: {extra:.1f} s once, {gain:.3f} s saved a step: {pays}")


def count_steps(args, model_dir):
    """Print the arithmetic of our step, and the memory that it takes on a GPU: on the only one, on each of several."""
    inputs = build_inputs(args, model_dir, torch.device("cpu"))
    for flags, off in [*((flags, ()) for flags in [[], *OPTIONS]), ([], FEATURES)]:
        settings = settings_for(model_dir, "-", *flags)
        tflop, alone, several = count_step(Ours(settings, *inputs, off=off, autocast=True))
        name = " ".join(["ours", *flags, *(off and ("without", " and ".join(off)))])
        print(f"{name:56} {tflop:6.2f} TFLOP, {alone:5.1f} GiB, on each of several GPUs {several:5.1f} GiB", flush=True)


def print_arithmetic(side, seconds, device):
    """The floating point operations of a step, and the share of the device's own matrix rate."""
    with FlopCounterMode(display=False) as counter:
        side.step()
    flops, n = counter.get_total_flops(), 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if side.denoiser.autocast else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    class Matrices:
        def step(self):
            a @ b

    time_steps(Matrices(), 3, device)
    rate = 2 * n**3 / time_steps(Matrices(), 10, device)
    achieved = flops / statistics.median(seconds)
    print(
        f"ours: {flops / 1e12:.3f} TFLOP a step, {achieved / 1e12:.2f} TFLOP/s,"
        f" {achieved / rate:.0%} of the {rate / 1e12:.2f} TFLOP/s of a large matrix product in {dtype}"
    )


def time_steps(side, steps, device):
    """Seconds a step."""
    start = time.perf_counter()
    for _ in range(steps):
        side.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def compare_jobs(args, model_dir, folder):
    """Print the seconds of each whole job and what its own lines say of speed and of where the seconds went; then
    the images/s of each (median), and the middle of its turns' ratios to the published loop without its report."""
    instance_dir, class_dir = ROOT / "images" / "lego-car", folder / "class"
    class_dir.mkdir()
    rng, (size, _) = np.random.default_rng(0), files.model_resolution(model_dir)
    for i in range(64):
        render.render(render.sample_scene(rng), rng).resize((size, size)).save(class_dir / f"{i}.png")
    common = ["--model_dir", model_dir, "--instance_images_dir", instance_dir, "--instance_prompt", PROMPTS[0],
              "--class_images_dir", class_dir, "--class_prompt", PROMPTS[1], "--train_batch_size", 2,
              "--num_epochs", 4, "--max_train_steps", args.job_steps]  # fmt: skip
    workers = [n for n in (1, 2, 4) if n <= (torch.cuda.device_count() or 2)]
    jobs = {
        f"train.py, {n} worker(s)": [ROOT / "train.py", *common, "--num_workers", n, "--output_dir", folder / f"out{n}"]
        for n in workers
    }
    plain = [published.__file__, *common[: common.index("--num_epochs")], "--max_train_steps", args.job_steps]
    base = "published, no report at a step"
    jobs[base] = [*plain, "--output_dir", folder / "plain", "--no_report"]
    with_report = {"published": [*plain, "--output_dir", folder / "published"]}
    rates = {}
    for turn in range(args.job_turns):
        for name, command in (jobs | (with_report if turn == 0 else {})).items():
            start = time.perf_counter()
            done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False)
            print(f"{name:32} {time.perf_counter() - start:6.1f} s in all, exit code {done.returncode}")
            told = [line for line in (done.stdout + done.stderr).splitlines() if re.search(r"images/s|save ", line)]
            for line in told[-2:]:
                print(f"    {re.sub(r'.*?pid=[^)]*[)]', '', line).strip()}", flush=True)
            rates.setdefault(name, []).extend(map(float, re.findall(r"([\d.]+) images/s", "".join(told))[-1:]))
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, rates[base], strict=False))
        print(f"{name:32} {statistics.median(values):6.2f} images/s {ratio:5.2f} x")


def main(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models.quiet()
    torch.set_num_threads(checks.cores())
    torch.set_float32_matmul_precision("high")  # as in train.py
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model_dir = build_sd14(folder / "sd14") if args.model == "sd14" else cache_model.POCKET_DIR
        if args.count:
            return count_steps(args, model_dir)
        if not args.jobs_only:
            compare_steps(args, model_dir, device)
        if not args.no_ray:
            compare_jobs(args, model_dir, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=checks.HelpFormatter)
    parser.add_argument("--model", choices=["pocket", "sd14"], default="pocket", help="sd14 for a GPU")
    parser.add_argument("--no_ray", action="store_true", help="the steps alone")
    parser.add_argument("--jobs_only", action="store_true", help="the jobs alone")
    parser.add_argument(
        "--count", action="store_true", help="count memory and arithmetic of a step, on any machine; no timing"
    )
    parser.add_argument("--compile", action="store_true", help="also with --compile, and when that pays")
    parser.add_argument("--batch_size", type=int, default=2, help="pairs a step")
    parser.add_argument("--steps", type=int, default=5, help="steps a turn")
    parser.add_argument("--turns", type=int, default=5, help="turns measured")
    parser.add_argument("--job_turns", type=int, default=3, help="times each job is run")
    parser.add_argument("--job_steps", type=int, default=60, help="steps of a job")
    main(parser.parse_args())
