"""Progress callbacks, precision and the learning-rate schedule that searches and training loops share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

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


def native_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware. Emulated bfloat16 is ten times slower than float32 on AVX2."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def half_precision(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where the device multiplies it in hardware; elsewhere it changes nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=native_bfloat16(device))
