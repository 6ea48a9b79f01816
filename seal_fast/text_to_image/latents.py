"""Latents of a text-to-image model: drawn with guidance, noised as a sampler meets them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from seal_fast.diffusion import VP
from seal_fast.diffusion.samplers import noise_levels, timestep_grid
from seal_fast.training import OnStep


def predict(unet: nn.Module, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """The UNet's output [B,C,h,w] in float32, whatever precision its weights have."""
    dtype = next(unet.parameters()).dtype
    out: Tensor = unet(latents.to(dtype), timesteps, text.to(dtype)).sample
    return out.float()


def noise_schedule(pipeline: Any) -> VP:
    """The pipeline's noise process.

    Raises:
        ValueError: the pipeline's scheduler is not one of the diffusion models' (no betas).
    """
    if "beta_schedule" not in pipeline.scheduler.config:
        raise ValueError(f"{type(pipeline.scheduler).__name__} has no beta schedule: the pipeline is not a diffusion model's")
    return VP.from_scheduler_config(pipeline.scheduler.config)


def latent_shape(unet: Any) -> tuple[int, int, int]:
    """[C,h,w] of the UNet's latents at the size it was made for."""
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return unet.config.in_channels, height, width


def noised(process: VP, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """States of a sampler [B,C,h,w] at timesteps [B]: noised latents, but pure noise at the last timestep, where it starts."""
    start = (timesteps == process.num_timesteps - 1)[:, None, None, None]
    return torch.where(start, noise, process.add_noise(latents, noise, timesteps).float())


def inverse_snr_weights(process: VP, max_loss_weight: float) -> Tensor:
    """How much larger an error of the UNet's output is in the image x0, within [1, max_loss_weight]: float64 [T].

    The squared error of predicted noise grows by b^2 / a^2, those of v and of x0 do not grow.
    """
    if process.prediction_type != "epsilon":
        return torch.ones_like(process.signal)
    return (process.noise / process.signal).square().clamp(1, max_loss_weight)


@torch.no_grad()
def guided_ddim(
    unet: nn.Module, process: VP, x: Tensor, texts: Tensor, empty: Tensor, *, steps: int, guidance: float
) -> Tensor:
    """Clean latents [B,C,h,w] from noise x, by deterministic DDIM (Song et al. 2021, equation 12, eta = 0).

    Guidance is classifier-free with the empty prompt (Ho & Salimans 2022): e("") + guidance (e(prompt) - e("")).

    Args:
        unet: predicts from latents, timesteps and texts, see `predict`.
        process: its noise schedule.
        x: noise, float32 [B,C,h,w].
        texts: embeddings of the prompts [B,L,D].
        empty: that of the empty prompt [1,L,D].
        steps: evenly spaced from the noisiest timestep to the clean image.
        guidance: 1 is none, at half the cost.
    """
    guided = guidance != 1
    states = torch.cat([empty.expand_as(texts), texts]) if guided else texts
    for here, there in pairwise(noise_levels(process, timestep_grid(process, steps))):
        rows = torch.cat([x, x]) if guided else x
        t = torch.full((len(rows),), here.t, device=x.device)
        noise = process.to_noise(predict(unet, rows, t, states), rows, t)
        if guided:
            without, told = noise.chunk(2)
            noise = without + guidance * (told - without)
        clean = (x - here.b * noise) / here.a
        x = there.a * clean + there.b * noise
    return x


@torch.no_grad()
def draw_latents(
    unet: Any,
    process: VP,
    texts: Tensor,
    empty: Tensor,
    *,
    steps: int,
    guidance: float,
    batch: int,
    generator: torch.Generator,
    on_step: OnStep,
) -> Tensor:
    """Latents of images, one per prompt: float32 [N,C,h,w] on the UNet's device. See `guided_ddim`.

    Args:
        unet: the teacher.
        process: its noise schedule.
        texts: embeddings of the prompts [N,L,D].
        empty: that of the empty prompt [1,L,D].
        steps: DDIM steps.
        guidance: guidance scale.
        batch: images at once.
        generator: on the CPU.
        on_step: called with stage "images" after every batch.
    """
    drawn = []
    for first in range(0, len(texts), batch):
        text = texts[first : first + batch]
        noise = torch.randn(len(text), *latent_shape(unet), generator=generator).to(texts.device)
        drawn.append(guided_ddim(unet, process, noise, text, empty, steps=steps, guidance=guidance))
        on_step("images", first + len(text), len(texts), math.nan)
    return torch.cat(drawn)
