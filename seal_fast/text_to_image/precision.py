"""Precision in which the networks of a pipeline run."""

from __future__ import annotations

from typing import Literal

import torch

from seal_fast.training import half_precision

Precision = Literal["fp32", "bf16", "fp16"]


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Autocast to a precision; "bf16" is float32 where the device does not multiply bfloat16 in hardware."""
    if precision == "bf16":
        return half_precision(device)
    return torch.autocast(device.type, torch.float16, enabled=precision == "fp16")
