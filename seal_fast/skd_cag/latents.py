"""States that the student is trained in: noised latents of the teacher's own pictures."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn

from seal_fast.terd.reversion import OnStep


def predict(unet: nn.Module, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """The UNet's output [B,C,h,w] in float32, whatever precision its weights have."""
    dtype = next(unet.parameters()).dtype
    out: Tensor = unet(latents.to(dtype), timesteps, text.to(dtype)).sample
    return out.float()


def forward_process(pipeline: Any) -> Any:
    """The pipeline's noise schedule with plain DDIM steps, a DDIMScheduler.

    Raises:
        ValueError: the pipeline's scheduler is not one of the diffusion models' (no betas).
    """
    if "beta_schedule" not in pipeline.scheduler.config:
        raise ValueError(f"{type(pipeline.scheduler).__name__} has no beta schedule: the pipeline is not a diffusion model's")
    return DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, thresholding=False)


def latent_shape(unet: Any) -> tuple[int, int, int]:
    """[C,h,w] of the UNet's latents at the size it was made for."""
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return unet.config.in_channels, height, width


def noised(process: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """States of a sampler [B,C,h,w] at timesteps [B]: noised latents, but pure noise at the last timestep, where it starts."""
    start = (timesteps == process.config.num_train_timesteps - 1)[:, None, None, None]
    return torch.where(start, noise, process.add_noise(latents, noise, timesteps))


@torch.no_grad()
def draw_latents(
    unet: Any,
    process: Any,
    texts: Tensor,
    empty: Tensor,
    *,
    steps: int,
    guidance: float,
    batch: int,
    generator: torch.Generator,
    on_step: OnStep,
) -> Tensor:
    """Latents of pictures by DDIM with classifier-free guidance, one per prompt: float32 [N,C,h,w] on the UNet's device.

    Args:
        unet: the teacher.
        process: see `forward_process`.
        texts: embeddings of the prompts [N,L,D].
        empty: that of the empty prompt [L,D].
        steps: DDIM steps.
        guidance: guidance scale; 1 leaves the empty prompt out.
        batch: pictures at once.
        generator: on the CPU.
        on_step: called with stage "pictures" after every batch.
    """
    process.set_timesteps(steps)
    device, drawn = texts.device, []
    for first in range(0, len(texts), batch):
        text = texts[first : first + batch]
        x = torch.randn(len(text), *latent_shape(unet), generator=generator).to(device)
        for t in process.timesteps:
            if guidance == 1:
                out = predict(unet, x, t.to(device), text)
            else:
                both = torch.cat([empty.expand_as(text), text])
                without, out = predict(unet, x.repeat(2, 1, 1, 1), t.to(device), both).chunk(2)
                out = without + guidance * (out - without)
            x = process.step(out, int(t), x, return_dict=False)[0]
        drawn.append(x)
        on_step("pictures", first + len(text), len(texts), math.nan)
    return torch.cat(drawn)
