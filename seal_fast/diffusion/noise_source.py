"""Random numbers of a search or a training run."""

from __future__ import annotations

import torch
from torch import Tensor


class NoiseSource:
    """Draws every random number on the CPU, so that a seed means the same run on every device.

    Args:
        device: device that the numbers are needed on.
        seed: seed of the sequence.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values on the CPU."""
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        """Values in [0, 1) on the CPU."""
        return torch.rand(shape, generator=self.generator)

    def integers(self, low: int, high: int, count: int) -> Tensor:
        """int64 [count] in [low, high) on the CPU."""
        return torch.randint(low, high, (count,), generator=self.generator)

    def fork(self) -> torch.Generator:
        """A generator on `device`, seeded from this sequence."""
        return torch.Generator(self.device).manual_seed(int(torch.randint(2**31, (), generator=self.generator)))

    def on_device(self, x: Tensor) -> Tensor:
        """x on `device`, copied without waiting for it."""
        # a copy from pageable memory would wait for the GPU
        pinned = self.device.type == "cuda" and not x.is_cuda
        return (x.pin_memory() if pinned else x).to(self.device, non_blocking=True)
