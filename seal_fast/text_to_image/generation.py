"""Draw images from a text-to-image pipeline, many prompts at once. A seed gives the same starting noise for every prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seal_fast.text_to_image.latents import guided_ddim, latent_shape, noise_schedule
from seal_fast.text_to_image.precision import Precision, autocast
from seal_fast.text_to_image.prompts import encode
from seal_fast.training import quiet

STEPS = 25
GUIDANCE = 7.5
LATENT_VALUES_PER_PASS = 1 << 17
"""Latent values in one batch: 8 images of Stable Diffusion's size, 128 of a model with latents of 4 x 16 x 16."""

OnPass = Callable[[int], None]
"""Called after every pass of the sampler with the number of images that it drew."""


def starting_noise(pipeline: Any, count: int, seed: int) -> Tensor:
    """Noise [count,C,H,W] on the CPU. A seed gives the same first samples for every count and every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(latent_shape(pipeline.unet), generator=generator) for _ in range(count)])


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seed: int,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    precision: Precision = "bf16",
    batch: int | None = None,
    noises: Sequence[int] | None = None,
    on_pass: OnPass = quiet,
) -> Tensor:
    """Draw one image per prompt, see `seal_fast.text_to_image.latents.guided_ddim`.

    Args:
        pipeline: a diffusers StableDiffusionPipeline on the device to draw on; it is not changed.
        prompts: N prompts, at least one.
        seed: seed of the starting noise; image i starts from the same noise whatever the prompts.
        steps: number of timesteps, evenly spaced from the noisiest one to 0.
        guidance: guidance scale; 1 means no guidance and needs half the computation.
        precision: precision of the networks, see `seal_fast.text_to_image.precision.autocast`.
        batch: images per pass; None for as many as have LATENT_VALUES_PER_PASS values.
        noises: the number of each image's starting noise among those of the seed; None for 0 to N - 1.
        on_pass: progress callback.

    Returns:
        Images float32 [N,3,H,W] in [0, 1], on the CPU.
    """
    latents = sample_latents(
        pipeline,
        prompts,
        seed=seed,
        steps=steps,
        guidance=guidance,
        precision=precision,
        batch=batch,
        noises=noises,
        on_pass=on_pass,
    )
    return decode(pipeline, latents, precision=precision, batch=batch)


@torch.no_grad()
def sample_latents(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seed: int,
    steps: int,
    guidance: float,
    precision: Precision = "bf16",
    batch: int | None = None,
    noises: Sequence[int] | None = None,
    on_pass: OnPass = quiet,
) -> Tensor:
    """The latents float32 [N,C,H,W] of `generate` on the CPU, scaled as the UNet takes them."""
    if not prompts:
        raise ValueError("no prompts to draw")
    process, batch = noise_schedule(pipeline), batch or batch_size(pipeline)
    numbers = list(range(len(prompts)) if noises is None else noises)
    starts = starting_noise(pipeline, max(numbers) + 1, seed)[numbers]
    drawn = []
    with autocast(pipeline.device, precision):
        empty = encode(pipeline, [""])
        for number, noise in enumerate(starts.split(batch)):
            texts = encode(pipeline, prompts[number * batch : (number + 1) * batch])
            x = noise.to(pipeline.device)
            drawn.append(guided_ddim(pipeline.unet, process, x, texts, empty, steps=steps, guidance=guidance).cpu())
            on_pass(len(x))
    return torch.cat(drawn)


@torch.no_grad()
def decode(pipeline: Any, latents: Tensor, *, precision: Precision = "bf16", batch: int | None = None) -> Tensor:
    """Images float32 [N,3,H,W] in [0, 1] on the CPU, from latents [N,C,h,w] scaled as the UNet takes them."""
    # the decoder's activations are larger than the UNet's
    part = max(1, (batch or batch_size(pipeline)) // 4)
    with autocast(pipeline.device, precision):
        images = [
            pipeline.vae.decode(some.to(pipeline.device) / pipeline.vae.config.scaling_factor).sample.float().cpu()
            for some in latents.split(part)
        ]
    return (torch.cat(images) / 2 + 0.5).clamp(0, 1)


def batch_size(pipeline: Any) -> int:
    """Images in one pass: as many as have LATENT_VALUES_PER_PASS values, at least one."""
    channels, height, width = latent_shape(pipeline.unet)
    return max(1, LATENT_VALUES_PER_PASS // (channels * height * width))
