"""What low precision costs: how far each variant's weights are, after the same steps, from float32's.

    python tests/benchmarks/precision.py --lr 2e-4
    python tests/benchmarks/precision.py --lr 5e-6       # the learning rate for Stable Diffusion

"Distance" is the length of the difference between two updates (weights after minus weights before) as a share
of the float32 update's length; "cosine" is the angle between the two. Stochastic rounding is measured where
torchao is installed; it is not required.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import cache_model
from dreambooth import checks, files, images, latents, models
from dreambooth.loss import training_loss
from dreambooth.pocket import render
from tests.benchmarks.published import PROMPTS, settings_for

BETAS = (0.9, 0.99)  # of every variant: bfloat16 cannot hold a slower second moment


def build_batches(count, pairs, vae):
    """`count` batches of pairs of the lego car and rendered cars: the same for every variant."""
    rng = np.random.default_rng(0)
    photos = images.find_images(ROOT / "images" / "lego-car")
    crops = [images.crop_image(str(photo), 64, seed)[0] for photo in photos for seed in range(6)]
    scenes = [render.sample_scene(rng) for _ in range(400)]
    others = [np.asarray(render.render(scene, rng)).transpose(2, 0, 1) for scene in scenes if scene.kind == "car"]
    instance, class_ = (latents.encode(vae, torch.from_numpy(np.stack(half)) / 127.5 - 1) for half in (crops, others))
    tokenizer = files.load_tokenizer(cache_model.POCKET_DIR)
    ids = tokenizer(list(PROMPTS), padding="max_length", max_length=tokenizer.model_max_length).input_ids
    for step in range(count):
        halves = [half[rng.integers(len(half), size=pairs)] for half in (instance, class_)]
        positions = list(range(step * pairs, (step + 1) * pairs))
        yield {"posteriors": torch.cat(halves), "prompt_ids": torch.tensor(ids), "positions": positions}


def gradients_of_two_workers(denoiser, scheduler, batch, draws, pairs):
    """As DDP's bf16_compress_hook averages them: rounded to bfloat16 before and after."""
    parameters, total = list(denoiser.parameters()), None
    for half in torch.arange(2 * pairs).view(2, 2, -1).unbind(1):  # of the instance and of the class half
        rows = half.flatten()
        part = {**batch, "posteriors": batch["posteriors"][rows]}
        loss = training_loss(denoiser, scheduler, part, {name: value[rows] for name, value in draws.items()}, 1.0)
        share = [g.bfloat16() / 2 for g in torch.autograd.grad(loss, parameters)]
        total = share if total is None else [a + b for a, b in zip(total, share, strict=True)]
    for parameter, gradient in zip(parameters, total, strict=True):
        parameter.grad = gradient.float()


def run(variant, args, batches):
    """Train one variant; returns its update as one vector, seconds a step, and bytes held a weight."""
    low = variant not in ("float32", "bfloat16 all-reduce")
    flags = [f"--lr={args.lr}", f"--adam_beta2={BETAS[1]}", f"--precision={'bf16' if low else 'fp32'}"]
    settings = settings_for(cache_model.POCKET_DIR, "-", *flags)
    _, denoiser, scheduler = models.load_models(settings, torch.device("cpu"), autocast=True)  # as on a GPU
    parameters = list(denoiser.parameters())
    start = [p.detach().double() for p in parameters]
    optimizer = models.build_optimizer(parameters, settings)
    if variant == "bfloat16 alone":
        optimizer = torch.optim.AdamW(parameters, args.lr, BETAS)
    elif variant == "stochastic rounding":
        from torchao.optim import _AdamW

        optimizer = _AdamW(parameters, lr=args.lr, betas=BETAS, bf16_stochastic_round=True)
    begun = []
    for batch in batches:
        begun.append(time.perf_counter())
        draws = latents.draw(0, batch, 1000)
        if variant == "bfloat16 all-reduce":
            gradients_of_two_workers(denoiser, scheduler, batch, draws, args.pairs)
        else:
            training_loss(denoiser, scheduler, batch, draws, 1.0).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        held = sum(t.numel() * t.element_size() for p in parameters for t in (p, p.grad, *tensors(optimizer.state[p])))
        optimizer.zero_grad()
    kept = [optimizer.state[p].get("kahan_comp", torch.zeros(1)).double() for p in parameters]
    update = [(p.detach().double() + k - s).flatten() for p, k, s in zip(parameters, kept, start, strict=True)]
    seconds = np.median(np.diff(begun))
    return torch.cat(update), seconds, held / sum(p.numel() for p in parameters)


def tensors(state):
    return [value for value in state.values() if isinstance(value, torch.Tensor) and value.dim()]


def main(args):
    models.quiet()
    torch.set_num_threads(checks.cores())
    vae, _, _ = models.load_models(settings_for(cache_model.POCKET_DIR, "-"), torch.device("cpu"))
    batches = list(build_batches(args.steps, args.pairs, vae))
    exact = None
    for variant in ("float32", "bfloat16 all-reduce", "Kahan summation", "stochastic rounding", "bfloat16 alone"):
        try:
            update, seconds, held = run(variant, args, batches)
        except ImportError as error:
            print(f"{variant:20} not measured: {error}")
            continue
        exact = update if exact is None else exact
        distance, cosine = (update - exact).norm() / exact.norm(), torch.cosine_similarity(update, exact, dim=0)
        print(f"{variant:20} distance {distance:.3f}  cosine {cosine:.4f}  {seconds:.3f} s a step ", end="")
        print(f"{held:4.1f} bytes a weight", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=checks.HelpFormatter)
    parser.add_argument("--lr", type=float, default=2e-4, help="learning rate; pocket's is 2e-4")
    parser.add_argument("--steps", type=int, default=60, help="steps of each variant")
    parser.add_argument("--pairs", type=int, default=4, help="pairs a step")
    main(parser.parse_args())
