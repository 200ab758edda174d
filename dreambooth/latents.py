"""Images into latents, once, and the random draws of a training step.

The frozen VAE's posterior of an image, a mean and a standard deviation for each latent, does not
change during a run: it is computed once for each crop. What a step trains on is drawn anew from it
(no frozen sample), as if the VAE ran at every step.

Letters: B pairs in a batch; R resolution; C, h, w channels, height and width of a latent; L tokens in a prompt.
"""

import torch

from dreambooth.seeds import seed_for

GOLDEN_RATIO = (5**0.5 - 1) / 2
PIXELS_AT_ONCE = 512 * 512  # through the VAE: more at once would need more memory than a step of LoRA


@torch.no_grad()
def encode(vae, images):
    """Mean and standard deviation of the posterior of `images` (N, 3, R, R), scaled so that latents have
    about unit variance: (N, 2, C, h, w), float32."""
    at_once = max(1, PIXELS_AT_ONCE // (images.shape[2] * images.shape[3]))
    posteriors = [vae.encode(part).latent_dist for part in images.split(at_once)]
    return torch.cat([torch.stack([p.mean, p.std], dim=1) for p in posteriors]) * vae.config.scaling_factor


def sample(posteriors, noise):
    """Latents (N, C, h, w) from `posteriors` (N, 2, C, h, w) and standard normal `noise` (N, C, h, w)."""
    return posteriors[:, 0] + posteriors[:, 1] * noise


def encode_batches(vae, batches, prompt_ids, device, live=False):
    """Replace the images of each of `batches` by their posteriors (2B, 2, C, h, w), and add `prompt_ids` (2, L);
    returns an iterator of batches on `device`.

    Each crop is encoded once, all of them before this returns, and then the VAE's memory is free for
    training. With `live`, a batch is encoded when its step needs it, as in the published example.
    """

    def whole(batch, posteriors):
        return {"posteriors": posteriors, "prompt_ids": prompt_ids, "positions": batch["positions"]}

    if live:
        return (whole(batch, encode(vae, batch["images"].to(device))) for batch in batches)
    number_of, parts, rows = {}, [], []  # crop -> its row in the table of posteriors
    for batch in batches:
        new = {key: i for i, key in enumerate(batch["keys"]) if key not in number_of}
        if new:
            parts.append(encode(vae, batch["images"][list(new.values())].to(device)))
            number_of.update({key: len(number_of) + n for n, key in enumerate(new)})
        rows.append((batch, torch.tensor([number_of[key] for key in batch["keys"]], device=device)))
        del batch["images"]
    table = torch.cat(parts)
    vae.to("meta")  # it has done its work
    return (whole(batch, table[numbers]) for batch, numbers in rows)


def draw(seed, batch, num_timesteps):
    """The random numbers of one batch: posterior_noise and noise (2B, C, h, w), timesteps (2B,).

    Those of a pair follow from the run's seed and the pair's position in the run alone: so they are
    the same however pairs are dealt to workers, batches and accumulation.
    """
    posteriors, positions = batch["posteriors"], batch["positions"]
    generator = torch.Generator(posteriors.device)
    normal = []
    for position in positions:
        generator.manual_seed(seed_for(seed, position))
        shape = (2, 2, *posteriors.shape[2:])  # two kinds of noise for each of two images
        normal.append(torch.randn(shape, generator=generator, device=posteriors.device))
    posterior_noise, noise = torch.stack(normal, dim=2).flatten(1, 2)  # (2B, C, h, w) each, instance half first
    timesteps = spread(seed, positions, num_timesteps).to(posteriors.device, non_blocking=True)
    return {"posterior_noise": posterior_noise, "noise": noise, "timesteps": timesteps}


def spread(seed, positions, num_timesteps):
    """A timestep for each image of the pairs at B `positions`, (2B,), instance half first.

    Each half walks through the timesteps by the golden ratio from a random start: any few pairs in a row
    have theirs spread evenly, high and low noise in every step, where independent draws cluster. The
    gradient is the same on average and less noisy (a low-discrepancy sampler, as in Kingma et al.
    2021, arXiv 2107.00630).
    """
    starts = torch.rand(2, 1, generator=torch.Generator().manual_seed(seed_for(seed)), dtype=torch.float64)
    fractions = (starts + GOLDEN_RATIO * torch.tensor(positions, dtype=torch.float64)) % 1
    return (fractions * num_timesteps).long().flatten()
