"""Noise schedules of training: which timesteps there are, and how noise is added at each.

Letters: N images; C, h, w channels, height and width of a latent.
"""

from types import SimpleNamespace

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler


class DiffusionSchedule(DDPMScheduler):
    """Discrete timesteps, at each of which latents are scaled and noise is added (Ho et al. 2020,
    arXiv 2006.11239, eq. 4)."""

    def timesteps_at(self, fractions, share):
        """Integer timesteps (N,), each at its place `fractions` (N,) in [0, 1) of the least noisy
        `share` (N,), in (0, 1], of the schedule. A fraction of 0 is the least noise."""
        return (fractions * share * len(self.alphas_cumprod)).long()

    def to(self, device):
        self.alphas_cumprod = self.alphas_cumprod.to(device)
        if not len(self.alphas_cumprod):
            raise ValueError("it has no timesteps")
        return self


class FlowSchedule:
    """The straight line from latents to noise (a flow, Lipman et al. 2023, arXiv 2210.02747, in the
    direction and with the shift of Esser et al. 2024, arXiv 2403.03206): a timestep is sigma, in
    (0, 1], the share of noise."""

    config = SimpleNamespace(prediction_type="flow_prediction")
    alphas_cumprod = None

    def __init__(self, shift=1.0):
        self.shift = shift

    @classmethod
    def from_pretrained(cls, model_dir, subfolder):
        """With the static shift of a model's own schedule; a dynamic one is for sampling."""
        config = FlowMatchEulerDiscreteScheduler.from_pretrained(
            model_dir, subfolder=subfolder
        ).config
        return cls(1.0 if config.use_dynamic_shifting else config.shift)

    def timesteps_at(self, fractions, share):
        """Sigmas (N,), float32, each at its place `fractions` (N,) in [0, 1) of the least noisy
        `share` (N,), in (0, 1], of the schedule. A fraction of 0 is the most noise, which keeps
        sigma above 0. The shift, of Esser et al.'s eq. 23, comes last:
        shift sigma / (1 + (shift - 1) sigma)."""
        sigmas = (1 - fractions) * share
        return (self.shift * sigmas / (1 + (self.shift - 1) * sigmas)).float()

    def to(self, device):
        return self

    def add_noise(self, latents, noise, sigmas):
        """(1 - sigma) latents + sigma noise, for latents and noise (N, C, h, w), sigmas (N,)."""
        return torch.lerp(latents, noise, sigmas.to(latents.dtype).view(-1, 1, 1, 1))
