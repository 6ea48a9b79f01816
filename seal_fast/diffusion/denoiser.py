"""A denoiser: a frozen network with its noise process, predicting eps from x_t and t."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seal_fast.diffusion.family import ModelFamily
from seal_fast.diffusion.process import VP, NoiseProcess


@dataclass(frozen=True)
class Denoiser:
    """Predicts noise: `denoiser(x [N,C,H,W], t int64 [N]) -> eps [N,C,H,W]`, differentiable in x.

    Construction freezes the weights. Reversion needs the gradient of the input only. The gradient of the weights would cost a
    third of every forward and backward pass.

    Attributes:
        network: called as network(x, condition); returns a tensor or an object with `.sample` (diffusers).
        process: the noise process the network was trained on.
        shape: (C, H, W) of the network's data: pixels, or the latents of latent diffusion.
        value_range: bound on the absolute value of nearly all data: 1 for pixels. Reversion represents data, triggers and
            targets as value_range times a tensor in [-1, 1].
    """

    network: nn.Module
    process: NoiseProcess
    shape: tuple[int, int, int]
    value_range: float = 1.0

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def family(self) -> ModelFamily:
        """The noise process, and what the network predicts."""
        return self.process.family

    @property
    def bounded(self) -> bool:
        """Whether the data certainly lies in [-1, 1], so that clamping the predicted clean image may stabilise sampling."""
        return isinstance(self.process, VP) and self.value_range == 1

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        scaled, condition = self.process.network_input(x, t)
        output = self.network(scaled, condition)
        return self.process.to_noise(getattr(output, "sample", output), x, t)
