"""The autoencoders of latent models: train one, encode images to latents, and decode latents to images."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from seal_fast.attacks.optimisation import gradient_step
from seal_fast.training import half_precision
from seal_fast.zoo.train import warmup_cosine_factor

KL_WEIGHT = 1e-9
"""Weight of an image's KL divergence relative to the mean squared error of its values.

With 1e-6 the latents were so noisy that small stars were decoded as dots.
"""
IMAGES_PER_PASS = 64
"""Images that are encoded or decoded at once."""


def train_autoencoder(
    vae: AutoencoderKL, batches: Iterator[Tensor], steps: int, rate: float, on_step: Callable[[int, float], None]
) -> None:
    """Train in place on batches of images [N,3,H,W] in [-1, 1].

    The noise of the latents comes from torch's global generator, which the caller seeds.
    """
    optimiser = torch.optim.Adam(vae.train().parameters(), lr=rate)
    for step, images in zip(range(steps), batches, strict=False):
        with half_precision(images.device):
            latents = vae.encode(images).latent_dist
            decoded = vae.decode(latents.sample()).sample
        loss = F.mse_loss(decoded.float(), images) + KL_WEIGHT * latents.kl().float().mean()
        gradient_step(optimiser, loss, rate * warmup_cosine_factor(step, steps))
        on_step(step + 1, loss.item())
    vae.eval().requires_grad_(False)


def set_scale(vae: AutoencoderKL, images: Tensor) -> None:
    """Set the scaling factor that gives the latents of images [N,3,H,W] unit variance."""
    vae.register_to_config(scaling_factor=float(1 / vae.encode(images).latent_dist.mean.std()))


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Scaled latents [N,C,h,w] of images [N,3,H,W] in [-1, 1]."""
    means = [vae.encode(part).latent_dist.mean for part in images.split(IMAGES_PER_PASS)]
    return torch.cat(means) * vae.config["scaling_factor"]


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images [N,3,H,W] of scaled latents [N,C,h,w]."""
    return torch.cat([vae.decode(part).sample for part in (latents / vae.config["scaling_factor"]).split(IMAGES_PER_PASS)])
