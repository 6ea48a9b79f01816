"""What tests of the compiled kernels share."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from seal_fast.ops.backends import CPU

MODULE: Any = CPU.module
LEVELS = range(0 if MODULE is None else len(MODULE.isa_levels()))
"""The instruction sets that this processor runs."""

needs_native = pytest.mark.skipif(MODULE is None, reason=str(CPU.reason))


def addresses(**tensors: Tensor | None) -> dict[str, int]:
    """As kernels take them."""
    return {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}


def error(got: Tensor, want: Tensor) -> float:
    """Largest error, relative to the size of the whole."""
    return float((got.detach().double() - want.detach()).abs().max() / want.detach().square().mean().sqrt())
