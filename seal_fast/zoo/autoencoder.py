"""Autoencoders of latent models: their training, and the way from images to latents and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from seal_fast.training import half_precision
from seal_fast.zoo.train import learning_rate_factor

KL_WEIGHT = 1e-9
"""Of an image's divergence against a value's squared error. At 1e-6 latents were so noisy that small stars were dots."""
PASS = 64
"""Images encoded or decoded at once."""


def train_autoencoder(
    vae: AutoencoderKL, batches: Iterator[Tensor], steps: int, rate: float, on_step: Callable[[int, float], None]
) -> None:
    """Train in place on batches of images [N,3,H,W] in [-1, 1]; noise of the latents is torch's own, seeded by the caller."""
    optimiser = torch.optim.Adam(vae.train().parameters(), lr=rate)
    for step, images in zip(range(steps), batches, strict=False):
        for group in optimiser.param_groups:
            group["lr"] = rate * learning_rate_factor(step, steps)
        with half_precision(images.device):
            latents = vae.encode(images).latent_dist
            decoded = vae.decode(latents.sample()).sample
        loss = F.mse_loss(decoded.float(), images) + KL_WEIGHT * latents.kl().float().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        on_step(step + 1, loss.item())
    vae.eval().requires_grad_(False)


def set_scale(vae: AutoencoderKL, images: Tensor) -> None:
    """Set the factor that scales the latents of images [N,3,H,W] to unit variance."""
    vae.register_to_config(scaling_factor=float(1 / vae.encode(images).latent_dist.mean.std()))


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Latents [N,C,h,w] of images [N,3,H,W] in [-1, 1], scaled as the UNet sees them."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in images.split(PASS)]) * vae.config["scaling_factor"]


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images [N,3,H,W] of latents [N,C,h,w] as the UNet sees them."""
    return torch.cat([vae.decode(part).sample for part in (latents / vae.config["scaling_factor"]).split(PASS)])
