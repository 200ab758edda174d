"""What low precision costs: how far each variant's weights are, after the same steps, from
float32's.

    python tests/benchmarks/precision.py --lr 2e-4
    python tests/benchmarks/precision.py --lr 5e-6       # the learning rate for Stable Diffusion

"Distance" is the norm of the difference between two updates (weights after minus weights before)
as a share of the float32 update's norm; "cosine" is that of the angle between the two. Stochastic
rounding is measured if torchao is installed; it is not required.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.published import settings_for, tokenize_prompts  # may stand in for Ray

# isort: split
import cache_model
from dreambooth import cluster, images, latents, models
from dreambooth.cli import ArgumentParser
from dreambooth.loss import training_loss
from dreambooth.pocket import render

VARIANTS = (
    "float32",
    "bfloat16 all-reduce",
    "Kahan summation",
    "stochastic rounding",
    "bfloat16 alone",
)
BETAS = (0.9, 0.99)  # of every variant: bfloat16 cannot hold a slower second moment


def build_batches(num_batches, num_pairs, vae):
    """`num_batches` batches of pairs of the LEGO car and rendered cars: the same for every variant.

    Each is a tuple of posteriors, posterior noise, noise and timesteps, instance half first.
    """
    rng = np.random.default_rng(0)
    photos = images.find_images(ROOT / "images" / "lego-car")
    crops = [images.crop_image(str(photo), 64, seed)[0] for photo in photos for seed in range(6)]
    scenes = [render.sample_scene(rng) for _ in range(400)]
    cars = [render.render(scene, rng) for scene in scenes if scene.kind == "car"]
    cars = [np.asarray(car).transpose(2, 0, 1) for car in cars]
    instance_posteriors = latents.encode(vae, torch.from_numpy(np.stack(crops)) / 127.5 - 1)
    class_posteriors = latents.encode(vae, torch.from_numpy(np.stack(cars)) / 127.5 - 1)
    batches = []
    for step in range(num_batches):
        instance_rows = rng.integers(len(instance_posteriors), size=num_pairs)
        class_rows = rng.integers(len(class_posteriors), size=num_pairs)
        posteriors = torch.cat([instance_posteriors[instance_rows], class_posteriors[class_rows]])
        positions = list(range(step * num_pairs, (step + 1) * num_pairs))
        noise = latents.sample_noise(0, positions, posteriors.shape[2:], posteriors.device)
        timesteps = latents.sample_timesteps(0, positions, 1000)
        batches.append((posteriors, *noise, timesteps))
    return batches


def loss_of_rows(models_and_prompts, batch, rows):
    """The loss of some of the images of a batch."""
    denoiser, scheduler, prompt_ids = models_and_prompts
    posteriors, posterior_noise, noise, timesteps = (tensor[rows] for tensor in batch)
    loss, _ = training_loss(
        denoiser, scheduler, posteriors, prompt_ids, posterior_noise, noise, timesteps, 1.0
    )
    return loss


def set_averaged_gradients(parameters, losses):
    """Average the gradients of the workers' `losses` as DDP's bf16_compress_hook does: rounded to
    bfloat16 before they are added."""
    averages = [torch.zeros_like(p, dtype=torch.bfloat16) for p in parameters]
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters)
        for average, gradient in zip(averages, gradients, strict=True):
            average += gradient.bfloat16() / len(losses)
    for parameter, average in zip(parameters, averages, strict=True):
        parameter.grad = average.float()


def build_optimizer(variant, parameters, settings):
    if variant == "bfloat16 alone":
        return torch.optim.AdamW(parameters, settings.lr, BETAS)
    if variant == "stochastic rounding":
        from torchao.optim import _AdamW

        return _AdamW(parameters, lr=settings.lr, betas=BETAS, bf16_stochastic_round=True)
    return models.build_optimizer(parameters, settings)


def bytes_held(parameters, optimizer):
    """The bytes of weights, gradients and optimizer state."""
    tensors = []
    for parameter in parameters:
        state = optimizer.state[parameter].values()
        moments = [value for value in state if isinstance(value, torch.Tensor) and value.dim()]
        tensors += [parameter, parameter.grad, *moments]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def train_variant(variant, args, batches):
    """Train one variant; returns its update as one vector, seconds per step, bytes per weight."""
    in_bf16 = variant not in ("float32", "bfloat16 all-reduce")
    flags = [f"--lr={args.lr}", f"--adam_beta2={BETAS[1]}"]
    flags.append(f"--param_dtype={'bf16' if in_bf16 else 'fp32'}")
    settings = settings_for(cache_model.POCKET_DIR, "-", *flags)
    device = torch.device("cpu")
    _, denoiser, scheduler = models.load_models(settings, device, autocast=True)  # as on a GPU
    models_and_prompts = (denoiser, scheduler, tokenize_prompts(cache_model.POCKET_DIR))
    parameters = list(denoiser.parameters())
    before = [p.detach().double() for p in parameters]
    optimizer = build_optimizer(variant, parameters, settings)
    began = []
    for batch in batches:
        began.append(time.perf_counter())
        if variant == "bfloat16 all-reduce":
            halves = torch.arange(args.pairs).chunk(2)
            shares = [torch.cat([half, args.pairs + half]) for half in halves]
            losses = [loss_of_rows(models_and_prompts, batch, rows) for rows in shares]
            set_averaged_gradients(parameters, losses)
        else:
            loss_of_rows(models_and_prompts, batch, slice(None)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        held = bytes_held(parameters, optimizer)
        optimizer.zero_grad()
    update = []
    for parameter, start in zip(parameters, before, strict=True):
        kept = optimizer.state[parameter].get("kahan_comp", torch.zeros(1)).double()
        update.append((parameter.detach().double() + kept - start).flatten())
    num_weights = sum(p.numel() for p in parameters)
    return torch.cat(update), np.median(np.diff(began)), held / num_weights


def main(args):
    torch.set_num_threads(cluster.num_cores())
    settings = settings_for(cache_model.POCKET_DIR, "-")
    vae, _, _ = models.load_models(settings, torch.device("cpu"))
    batches = build_batches(args.steps, args.pairs, vae)
    exact = None
    for variant in VARIANTS:
        try:
            update, seconds, held = train_variant(variant, args, batches)
        except ImportError as error:
            print(f"{variant:20} not measured: {error}")
            continue
        if exact is None:
            exact = update
        distance = (update - exact).norm() / exact.norm()
        cosine = torch.cosine_similarity(update, exact, dim=0)
        print(
            f"{variant:20} distance {distance:.3f}  cosine {cosine:.4f}"
            f"  {seconds:.3f} s per step  {held:4.1f} bytes per weight",
            flush=True,
        )


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    parser.add_argument("--lr", type=float, default=2e-4, help="learning rate; pocket's is 2e-4")
    parser.add_argument("--steps", type=int, default=60, help="steps of each variant")
    parser.add_argument("--pairs", type=int, default=4, help="pairs per step")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
