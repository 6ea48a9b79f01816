"""Draw images from a text-to-image pipeline: many prompts at once, the same noise for the same seed, whatever the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seal_fast.text_to_image.latents import guided_ddim, latent_shape, noise_schedule
from seal_fast.training import half_precision

STEPS = 25
GUIDANCE = 7.5
LATENTS_PER_PASS = 1 << 17
"""Latent values in one batch: 8 images of Stable Diffusion's size, 128 of a model with latents of 4 x 16 x 16."""

OnPass = Callable[[int], None]


def unseen(images: int) -> None:
    """A callback that shows nothing."""


def starting_noise(pipeline: Any, count: int, seed: int) -> Tensor:
    """Noise [count,C,H,W] on the CPU; its first rows are the same for every count and every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(latent_shape(pipeline.unet), generator=generator) for _ in range(count)])


def token_ids(pipeline: Any, prompts: Sequence[str]) -> Tensor:
    """Ids int64 [N,L] as the text encoder gets them: padded to the tokenizer's length, cut where longer."""
    tokenizer = pipeline.tokenizer
    length = tokenizer.model_max_length
    padded = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return padded.input_ids


@torch.no_grad()
def encode(pipeline: Any, prompts: Sequence[str]) -> Tensor:
    """Hidden states of the prompts, [N,L,D]."""
    return pipeline.text_encoder(token_ids(pipeline, prompts).to(pipeline.device)).last_hidden_state


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seed: int,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    on_pass: OnPass = unseen,
) -> Tensor:
    """One image per prompt, see `seal_fast.text_to_image.latents.guided_ddim`; bfloat16 where the hardware has it.

    Args:
        pipeline: a diffusers StableDiffusionPipeline, on the device to draw on; not changed.
        prompts: N of them, at least one.
        seed: of the starting noise; image i starts from the same noise whatever the prompts.
        steps: evenly spaced from the noisiest timestep to the clean image.
        guidance: 1 is none, at half the cost.
        on_pass: called after every pass of the sampler with how many images it drew.

    Returns:
        Images float32 [N,3,H,W] in [0, 1], on the CPU.
    """
    return decode(pipeline, sample_latents(pipeline, prompts, seed=seed, steps=steps, guidance=guidance, on_pass=on_pass))


@torch.no_grad()
def sample_latents(
    pipeline: Any, prompts: Sequence[str], *, seed: int, steps: int, guidance: float, on_pass: OnPass = unseen
) -> Tensor:
    """The latents float32 [N,C,H,W] of `generate`, scaled as the UNet sees them, on the CPU."""
    if not prompts:
        raise ValueError("no prompts to draw")
    process, rows = noise_schedule(pipeline), _rows_per_pass(pipeline)
    drawn = []
    with half_precision(pipeline.device):
        empty = encode(pipeline, [""])
        for at, noise in enumerate(starting_noise(pipeline, len(prompts), seed).split(rows)):
            texts = encode(pipeline, prompts[at * rows : (at + 1) * rows])
            x = noise.to(pipeline.device)
            drawn.append(guided_ddim(pipeline.unet, process, x, texts, empty, steps=steps, guidance=guidance).cpu())
            on_pass(len(x))
    return torch.cat(drawn)


@torch.no_grad()
def decode(pipeline: Any, latents: Tensor) -> Tensor:
    """Images float32 [N,3,H,W] in [0, 1] on the CPU, from latents [N,C,h,w] as the UNet sees them."""
    # the decoder's activations are larger than the UNet's
    rows = max(1, _rows_per_pass(pipeline) // 4)
    with half_precision(pipeline.device):
        images = [
            pipeline.vae.decode(part.to(pipeline.device) / pipeline.vae.config.scaling_factor).sample.float().cpu()
            for part in latents.split(rows)
        ]
    return (torch.cat(images) / 2 + 0.5).clamp(0, 1)


def _rows_per_pass(pipeline: Any) -> int:
    channels, height, width = latent_shape(pipeline.unet)
    return max(1, LATENTS_PER_PASS // (channels * height * width))
