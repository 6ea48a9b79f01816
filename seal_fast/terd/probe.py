"""What every search asks of the suspect: predicted noise, counted, at the precision the hardware is fast at."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seal_fast.diffusion import Denoiser, accelerated
from seal_fast.terd.replayed import Replayed
from seal_fast.terd.reversion import rows_per_pass
from seal_fast.training import native_bfloat16

COARSE = 4
"""Side of the random grid that starts are made from: triggers are pictures, not noise."""


@dataclass
class Probe:
    """A denoiser under examination.

    Attributes:
        denoiser: the suspect model; becomes its accelerated equivalent.
        generator: source of all noise, on the CPU so that a seed means the same run on every device.
        half_precision: bfloat16 autocast where the hardware has it.
        evaluations: denoiser evaluations spent so far, counted in images.
        finite: False once an answer was not.
    """

    denoiser: Denoiser
    generator: torch.Generator
    half_precision: bool
    evaluations: int = 0
    finite: bool = True

    def __post_init__(self) -> None:
        self.denoiser = accelerated(self.denoiser, torch.bfloat16 if self.autocasts else torch.float32)
        if self.denoiser.device.type == "cuda":
            self.denoiser = replace(self.denoiser, network=Replayed(self.denoiser.network))

    @property
    def autocasts(self) -> bool:
        return self.half_precision and native_bfloat16(self.denoiser.device)

    def noise(self, count: int) -> Tensor:
        """eps [count,C,H,W]."""
        return torch.randn(count, *self.denoiser.shape, generator=self.generator).to(self.denoiser.device)

    def coarse_pictures(self, count: int) -> Tensor:
        """Smooth random pictures [count,C,H,W]."""
        channels, height, width = self.denoiser.shape
        grid = torch.randn(count, channels, COARSE, COARSE, generator=self.generator).to(self.denoiser.device)
        return torch.nn.functional.interpolate(grid, size=(height, width), mode="bilinear")

    def precision(self) -> torch.autocast:
        return torch.autocast(self.denoiser.device.type, torch.bfloat16, enabled=self.autocasts)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """f(x [N,C,H,W], t int64 [N]) as float32, differentiable in x."""
        self.evaluations += len(x)
        rows = rows_per_pass(x)
        with self.precision():
            f = torch.cat([self.denoiser(*part).float() for part in zip(x.split(rows), t.split(rows), strict=True)])
        self.finite = self.finite and bool(f.isfinite().all())
        return f
