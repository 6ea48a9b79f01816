"""Latents of a text-to-image model: drawn from prompts with guidance, and noised for training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seal_fast.diffusion import VP
from seal_fast.diffusion.samplers import sample
from seal_fast.training import OnStep


def predict(unet: nn.Module, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """The UNet's output [B,C,h,w] in float32, whatever precision its weights have."""
    dtype = next(unet.parameters()).dtype
    out: Tensor = unet(latents.to(dtype), timesteps, text.to(dtype)).sample
    return out.float()


def noise_schedule(pipeline: Any) -> VP:
    """The pipeline's noise process.

    Raises:
        ValueError: the scheduler has no betas, so it is not a diffusion model's.
    """
    if "beta_schedule" not in pipeline.scheduler.config:
        raise ValueError(f"{type(pipeline.scheduler).__name__} has no beta schedule: the pipeline is not a diffusion model's")
    return VP.from_scheduler_config(pipeline.scheduler.config)


def latent_shape(unet: Any) -> tuple[int, int, int]:
    """Shape [C,h,w] of the UNet's latents at the image size that it was made for."""
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return unet.config.in_channels, height, width


def noised(process: VP, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Training states [B,C,h,w] at timesteps [B]: noised latents; at the last timestep pure noise, as a sampler starts from."""
    start = (timesteps == process.num_timesteps - 1)[:, None, None, None]
    return torch.where(start, noise, process.add_noise(latents, noise, timesteps).float())


def inverse_snr_weights(process: VP, max_loss_weight: float) -> Tensor:
    """Factor by which a squared error of the UNet's output grows in the predicted image x0, float64 [T], clamped.

    For predicted noise the factor is b^2 / a^2, clamped to [1, max_loss_weight]. For predicted v and x0 it is 1.
    """
    if process.prediction_type != "epsilon":
        return torch.ones_like(process.signal)
    return (process.noise / process.signal).square().clamp(1, max_loss_weight)


@dataclass(frozen=True)
class GuidedNoise:
    """Noise predicted under classifier-free guidance with the empty prompt (Ho & Salimans 2022).

    e("") + guidance (e(prompt) - e(""))

    Attributes:
        unet: predicts from latents, timesteps and hidden states, see `predict`.
        process: its noise process.
        texts: hidden states of the prompts [B,L,D].
        empty: hidden states of the empty prompt [1,L,D].
        guidance: guidance scale; 1 means no guidance and needs half the computation.
    """

    unet: nn.Module
    process: VP
    texts: Tensor
    empty: Tensor
    guidance: float

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Predicted noise float32 [B,C,h,w] in latents x at timesteps t [B]."""
        if self.guidance == 1:
            return self._noise(x, t, self.texts)
        both = torch.cat([self.empty.expand_as(self.texts), self.texts])
        unconditional, conditional = self._noise(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)

    def _noise(self, x: Tensor, t: Tensor, texts: Tensor) -> Tensor:
        return self.process.to_noise(predict(self.unet, x, t, texts), x, t)


@torch.no_grad()
def guided_ddim(
    unet: nn.Module, process: VP, noise: Tensor, texts: Tensor, empty: Tensor, *, steps: int, guidance: float
) -> Tensor:
    """Clean latents [B,C,h,w] by deterministic DDIM under classifier-free guidance.

    Args:
        unet: see `GuidedNoise`, as for `process`, `texts`, `empty` and `guidance`.
        noise: starting noise, float32 [B,C,h,w].
        steps: number of timesteps, evenly spaced from the noisiest one to 0.
    """
    return sample(GuidedNoise(unet, process, texts, empty, guidance), noise, "ddim", steps)


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
    """Draw latents for training, one per prompt: float32 [N,C,h,w] on the UNet's device.

    Args:
        unet: the teacher; see `guided_ddim`, as for `process`, `texts`, `empty`, `steps` and `guidance`.
        batch: latents per pass.
        generator: on the CPU; draws the starting noise.
        on_step: called with stage "images" after every batch.
    """
    drawn = []
    for first in range(0, len(texts), batch):
        text = texts[first : first + batch]
        noise = torch.randn(len(text), *latent_shape(unet), generator=generator).to(texts.device)
        drawn.append(guided_ddim(unet, process, noise, text, empty, steps=steps, guidance=guidance))
        on_step("images", first + len(text), len(texts), math.nan)
    return torch.cat(drawn)
