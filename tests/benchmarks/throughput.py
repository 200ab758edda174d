"""Training speed and memory: this project's step against the published example's, as ratios within
one run. (jobs.py compares whole jobs.)

    python tests/benchmarks/throughput.py --model pocket
    python tests/benchmarks/throughput.py --model sd14             # on a GPU; Ray may be missing
    python tests/benchmarks/throughput.py --model sd14 --count     # on any machine: memory and
    python tests/benchmarks/throughput.py --model sdxl --count     # arithmetic of a step
    python tests/benchmarks/throughput.py --model klein --count --resolution 512

"sd14", "sdxl" and "klein" are the architectures of Stable Diffusion 1.4, SDXL and FLUX.2-klein 4B
with random weights.

Each side trains its own copy of the model. On a CPU the sides take turns, so that a busy machine
slows them alike; on a GPU one side at a time is in memory. "plain" is the published step: bfloat16
weights and noise schedule, VAE and text encoder at every step. The sides below "ours" have one of
its features switched off or an option on.
"""

import functools
import gc
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    Flux2Transformer2DModel,
    UNet2DConditionModel,
)
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.counting import GIB, META, count_gib, count_tflop, without_weights
from tests.benchmarks.published import Plain, conditions_of, settings_for

# isort: split
from dreambooth import families, latents, models
from dreambooth.cli import ArgumentParser, silence_model_libraries
from dreambooth.files import pipeline_dir as directory
from dreambooth.loss import training_loss
from dreambooth.machines.device import num_cores
from dreambooth.pocket import POCKET_DIR, pretrain

FEATURES = ["cached latents", "prompts encoded once"]
GPU_FEATURES = ["channels_last", "fused AdamW"]
GPU_OPTIONS = [["--cuda_graph"], ["--cuda_graph", "--use_lora"]]
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
    return {"vae": vae, "text_encoder": text_encoder, "unet": unet}


def new_sdxl_models():
    """VAE and U-Net of SDXL's architecture: 84 and 2567 M. Its text encoders have left the GPU."""
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return {"vae": new_sd14_models()["vae"], "unet": unet}


def new_klein_models():
    """VAE and transformer of FLUX.2-klein 4B's architecture: 84 and 3876 M. Its text encoder has
    left the GPU."""
    transformer = Flux2Transformer2DModel(
        num_layers=5,
        num_single_layers=20,
        num_attention_heads=24,
        joint_attention_dim=7680,
        guidance_embeds=False,
    )
    return {"vae": AutoencoderKLFlux2(), "transformer": transformer}


def prompts_of_sd14(num_images, device):
    ids = torch.empty(2, 77, dtype=torch.long, device=device)
    return {"input_ids": ids, "counts": [num_images // 2] * 2}


def prompts_of_sdxl(num_images, device):
    added = {"text_embeds": (num_images, 1280), "time_ids": (num_images, 6)}
    added = {name: torch.empty(shape, device=device) for name, shape in added.items()}
    prompt_embeds = torch.empty(num_images, 77, 2048, device=device)
    return {"prompt_embeds": prompt_embeds, "added_cond_kwargs": added}


def prompts_of_klein(num_images, device):
    shape = num_images, 512, 7680
    return {"prompt_embeds": torch.empty(shape, dtype=torch.bfloat16, device=device)}


COUNTED = {  # family, models, prompts, and resolution
    "sd14": (families.StableDiffusion, new_sd14_models, prompts_of_sd14, 512),
    "sdxl": (families.StableDiffusionXL, new_sdxl_models, prompts_of_sdxl, 1024),
    "klein": (families.Flux2Klein, new_klein_models, prompts_of_klein, 1024),
}


def pipeline_of(model, folder):
    """The pipeline directory of a --model: sd14 is made in `folder`."""
    return build_sd14(Path(folder) / "sd14") if model == "sd14" else POCKET_DIR


def build_sd14(folder):
    """Write a pipeline directory with `new_sd14_models`. The tokenizer is pocket's, padded to 77
    tokens."""
    torch.manual_seed(0)
    tokenizer = directory.load_tokenizer(POCKET_DIR)
    tokenizer.model_max_length = 77
    pretrain.export(tokenizer, *new_sd14_models().values(), folder)
    return folder


class Ours:
    """The step of train.py, with some of its features switched off by name.

    With `keep_gradients` their memory is held from step to step, as DDP's buckets are.
    """

    keep_gradients = False

    def __init__(self, settings, pixels, conditions, device, off=(), autocast=None):
        self.settings = settings
        self.vae, self.denoiser, self.scheduler = models.load_models(settings, device, autocast)
        if "channels_last" in off:
            self.denoiser.unet.to(memory_format=torch.contiguous_format)
        self.model = self.denoiser
        if settings.cuda_graph:
            self.model = models.Captured(self.denoiser)
        self.parameters = [p for p in self.denoiser.parameters() if p.requires_grad]
        self.optimizer = models.build_optimizer(self.parameters, settings)
        if "fused AdamW" in off:
            self.optimizer = torch.optim.AdamW(self.parameters, settings.lr)
        num_pairs = len(pixels) // 2
        self.positions = list(range(num_pairs))
        self.conditions = tree_map_only(torch.Tensor, lambda t: t.to(device), conditions)
        if "prompts encoded once" in off:
            self.conditions = self.denoiser.family.one_per_image(self.conditions)
        self.pixels = pixels.to(device)
        self.posteriors = latents.encode(self.vae, self.pixels, self.denoiser.family)
        self.encode_each_step = "cached latents" in off

    def step(self):
        for _ in range(self.settings.gradient_accumulation_steps):
            self.forward_backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)

    def forward_backward(self):
        if self.encode_each_step:
            self.posteriors = latents.encode(self.vae, self.pixels, self.denoiser.family)
        posteriors = self.posteriors
        posterior_noise, noise = latents.sample_noise(
            0, self.positions, posteriors.shape[2:], posteriors.device
        )
        timesteps = self.scheduler.timesteps_at(latents.sample_fractions(0, self.positions), 1.0)
        timesteps = timesteps.to(posteriors.device, non_blocking=True)
        loss, _ = training_loss(
            self.model, self.scheduler, posteriors, self.conditions, posterior_noise, noise,
            timesteps, 1.0,
        )  # fmt: skip
        loss.backward()


def build_inputs(args, pipeline_dir, device):
    """What both sides take: the pixels of a batch, the prompts, and the device."""
    resolution, _ = directory.resolution(pipeline_dir)
    pixels = torch.rand(2 * args.batch_size, 3, resolution, resolution) * 2 - 1
    return pixels, conditions_of(pipeline_dir, len(pixels)), device


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
    more = GPU_OPTIONS if on_gpu else []
    for flags in OPTIONS + more + ([["--compile"]] if args.compile else []):
        option_settings = settings_for(pipeline_dir, "-", *flags)
        sides[f"ours {' '.join(flags)}"] = functools.partial(Ours, option_settings, *inputs)
    return sides


@dataclass
class Timing:
    """Seconds of a side's first step, seconds per step of each turn, and on a GPU the
    most memory that torch reserved."""

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
            timing.peak_gib = torch.cuda.max_memory_reserved() / GIB  # replays allocate nothing
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
        peak = f"  reserved {timing.peak_gib:5.2f} GiB" if timing.peak_gib else ""
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


def counted_side(model, flags, num_pairs=2, off=(), resolution=None):
    """Our side with `flags` and a model of COUNTED, on the meta device."""
    family, new_models, prompts, side = COUNTED[model]
    side = resolution or side
    settings = settings_for(POCKET_DIR, "-", *flags)  # its noise schedule is the same
    settings.train_text_encoder = model == "sd14"
    pixels = torch.empty(2 * num_pairs, 3, side, side, device=META)
    conditions = prompts(2 * num_pairs, META)
    with without_weights(new_models), patch.object(models, "family_of", lambda folder: family()):
        return Ours(settings, pixels, conditions, META, off=off, autocast=True)


def count_steps(model, num_pairs, resolution=None):
    """Print the arithmetic of our step, and the memory that it takes on a single GPU and on each of
    several: the numbers of dreambooth/machines/memory.py and RESULTS.md."""
    cases = [(flags, ()) for flags in [[], *OPTIONS, ["--gradient_accumulation_steps=2"]]]
    if model == "sd14":
        cases.append(([], FEATURES))
    for flags, off in cases:
        side = counted_side(model, flags, num_pairs, off, resolution)
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


def main(args):
    if args.count:
        count_steps(args.model, args.batch_size, args.resolution)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(num_cores())
    torch.set_float32_matmul_precision("high")  # as in train.py
    silence_model_libraries()
    with tempfile.TemporaryDirectory() as folder:
        compare_steps(args, pipeline_of(args.model, folder), device)


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--model", choices=["pocket", *COUNTED], default="pocket", help="sd14: for a GPU"
    )
    parser.add_argument("--batch_size", type=int, default=2, help="pairs per step and worker")
    parser.add_argument(
        "--count",
        action="store_true",
        help="count memory and arithmetic of a step of sd14, sdxl or klein, and time nothing",
    )
    parser.add_argument("--resolution", type=int, help="pixels that --count counts at")

    group = parser.add_argument_group("steps")
    group.add_argument(
        "--compile", action="store_true", help="time --compile too, and print when it pays"
    )
    group.add_argument("--steps", type=int, default=5, help="steps per turn")
    group.add_argument("--turns", type=int, default=5, help="turns measured")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
