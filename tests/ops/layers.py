"""What tests of a UNet's layers share."""

from __future__ import annotations

import pytest
from torch import Tensor

from seal_fast.ops import native

needs_native = pytest.mark.skipif(native.CPU.module is None, reason=str(native.CPU.reason))


def error(got: Tensor, want: Tensor) -> float:
    """Largest, relative to the size of the whole."""
    return float((got.detach().double() - want.detach()).abs().max() / want.detach().square().mean().sqrt())
