"""Images to latents, each crop once, and the random numbers of a training step.

The frozen VAE's posterior of an image, a mean and a standard deviation per latent, does not change
during a run: it is computed once per crop. Each step samples it anew, as if the VAE ran again.

Letters: N images; B pairs in a batch; R resolution; C, h, w channels, height and width of a latent.
"""

from contextlib import nullcontext
from functools import partial

import torch

from dreambooth.seeds import seed_for

INVERSE_GOLDEN_RATIO = (5**0.5 - 1) / 2
MAX_BYTES_ON_DEVICE = 2**28  # of posteriors: Stable Diffusion's 128 KiB at 512 px, klein's 4 MiB
PIXELS_PER_PASS = 512 * 512  # through the VAE: more would need more memory than a LoRA's step


@torch.no_grad()
def encode(vae, images, family, in_float16=None):
    """Mean and standard deviation of the posterior of `images` (N, 3, R, R), scaled by `family` so
    that latents have about unit variance: (N, 2, C, h, w), float32.

    On a CPU one image at a time: so the last bits do not depend on which images come together. On a
    GPU, unless `in_float16` says otherwise, matrix products and convolutions run in float16, which
    rounds as TF32 does, at twice the speed. Its largest number is 65504: where the result is not
    finite, the images are encoded again in float32.
    """
    on_gpu = images.device.type == "cuda"
    if in_float16 is None:
        in_float16 = on_gpu and family.vae_in_float16(vae)
    images_per_pass = max(1, PIXELS_PER_PASS // images[0, 0].numel()) if on_gpu else 1
    with torch.autocast(images.device.type, torch.float16) if in_float16 else nullcontext():
        posteriors = [vae.encode(part).latent_dist for part in images.split(images_per_pass)]
    if in_float16 and not all_finite([p.parameters for p in posteriors]):
        return encode(vae, images, family, in_float16=False)
    # Not `p.std`, which has been computed in float16.
    stacked = [torch.stack([p.mean.float(), (p.logvar.float() / 2).exp()], 1) for p in posteriors]
    return family.scale(vae, torch.cat(stacked))


def all_finite(tensors):
    """Whether no tensor holds inf or nan. The CPU waits for the GPU, once for all of them."""
    return bool(torch.cat(tensors).isfinite().all())


def encode_batches(vae, batches, family, encoded_prompts, device, predict_original=None):
    """Encode the images of `batches`, dicts as `dataset.collate` returns them. Each crop is encoded
    once, when the first step that trains on it asks for its batch, and kept to the run's end.

    `encoded_prompts`: what `family.encode_prompts` returned. `predict_original`: None, or
    what `models.load_original` returned. Yields dicts of

        posteriors  (2B, 2, C, h, w), on `device`
        conditions  what `family.predict` needs beside noisy latents and timesteps
        positions   B integers
        predict_original  None, or a function of the class half's noisy latents and timesteps
    """
    posterior_of = {}  # by crop
    for batch in batches:
        new = {key: i for i, key in enumerate(batch["keys"]) if key not in posterior_of}
        if new:
            images = batch["images"][list(new.values())].to(device)
            encoded = encode(vae, images, family)
            if (len(posterior_of) + 1) * encoded[0].nbytes > MAX_BYTES_ON_DEVICE:
                encoded = encoded.cpu()
            posterior_of.update(zip(new, encoded, strict=True))
        posteriors = torch.stack([posterior_of[key].to(device) for key in batch["keys"]])
        predict_class = None
        if predict_original:
            names, half = ("images", "prompt_numbers", "sizes"), len(posteriors) // 2
            of_class = family.conditions(encoded_prompts, {n: batch[n][half:] for n in names})
            predict_class = partial(predict_original, conditions=of_class)
        yield {
            "posteriors": posteriors,
            "conditions": family.conditions(encoded_prompts, batch),
            "predict_original": predict_class,
            "positions": batch["positions"],
        }


def sample_noise(seed, positions, latent_shape, device):
    """Standard normal noise for the pairs at B `positions`: to sample each posterior with, and to
    add to the latents; two tensors (2B, C, h, w), instance half first.

    A pair's noise follows from the run's seed and the pair's position in the run alone: it does not
    depend on how pairs are dealt to workers, batches and accumulation, nor on the device, as it is
    drawn on the CPU. `latent_shape`: (C, h, w).
    """
    generator, on_gpu = torch.Generator(), torch.device(device).type == "cuda"
    # (kinds, images, B, C, h, w); pinned, as a copy from other memory may wait for earlier kernels.
    noise = torch.empty((2, 2, len(positions), *latent_shape), pin_memory=on_gpu)
    for i, position in enumerate(positions):
        generator.manual_seed(seed_for("noise", seed, position))
        noise[:, :, i] = torch.randn((2, 2, *latent_shape), generator=generator)
    return tuple(noise.flatten(1, 2).to(device, non_blocking=True))  # posterior noise, latent noise


def sample_timesteps(scheduler, seed, positions, max_instance_noise=1.0):
    """The timesteps of both images of the pairs at B `positions`: (2B,), instance half first.

    The instance half is trained only at the least noisy fraction `max_instance_noise`, in (0, 1],
    of the schedule. At more noise, little but an image's place and light is left to predict: a
    subject that is trained there takes on the place and the light of its few photos, whatever the
    prompt (Soboleva et al. 2025, arXiv 2507.05964, train fewer weights there).
    """
    fractions = sample_fractions(seed, positions)
    share = torch.ones_like(fractions)
    share[: len(positions)] = max_instance_noise
    return scheduler.timesteps_at(fractions, share)


def sample_fractions(seed, positions):
    """The place in the noise schedule at which each image of the pairs at B `positions` is trained:
    (2B,) in [0, 1), float64, instance half first.

    Each half walks through the schedule by the golden ratio from a random start: consecutive pairs
    have theirs spread evenly, high and low noise in every step, where independent samples cluster.
    The gradient is the same on average and less noisy (a low-discrepancy sampler, as in Kingma et
    al. 2021, arXiv 2107.00630). The two halves keep the distance of their starts.
    """
    generator = torch.Generator().manual_seed(seed_for("timesteps", seed))
    starts = torch.rand(2, 1, generator=generator, dtype=torch.float64)
    steps = INVERSE_GOLDEN_RATIO * torch.tensor(positions, dtype=torch.float64)
    fractions = (starts + steps) % 1  # (2, B)
    return fractions.flatten()
