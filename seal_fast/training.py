"""Progress callbacks, precision, learning-rate schedule and moving average that searches and training loops share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

OnStep = Callable[[str, int, int, float], None]
"""Called with the stage, the iteration (from 1), the stage's iterations, and the loss per dimension (NaN if it has none)."""


class Stage(NamedTuple):
    """One stage of a run: its name, its iterations, and the images that each iteration puts through the network."""

    name: str
    iterations: int
    images: int


def quiet(*progress: object) -> None:
    """A progress callback that reports nothing."""


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first tenth of the steps, multiplied by a cosine that falls to 0."""
    return min(1.0, (step + 1) / max(1, steps // 10)) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def update_average(average: Iterable[Tensor], weights: Iterable[Tensor], step: int, decay: float) -> None:
    """Update an exponential moving average of weights in place.

    The decay at step n (from 0) is min(decay, (1 + n) / (10 + n)), so that the average soon forgets the initial weights.
    """
    decay = min(decay, (1 + step) / (10 + step))
    for mean, current in zip(average, weights, strict=True):
        mean.lerp_(current, 1 - decay)


def native_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware. Emulated bfloat16 is ten times slower than float32 on AVX2."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def half_precision(device: torch.device, wanted: bool = True) -> torch.autocast:
    """Autocast to bfloat16 if it is wanted and the device multiplies it in hardware; otherwise it changes nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and native_bfloat16(device))
