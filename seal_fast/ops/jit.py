"""The Triton kernels. Optional, and imported only when a tensor on a GPU asks for them."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch

OLDEST = (8, 0)
"""Compute capability of the oldest GPUs that the kernels are compiled for in the tests."""


def kernels(op: str) -> Any:
    """The module of an op's kernels. Raises ImportError without Triton."""
    return import_module(f"seal_fast.kernels.{op}")


@cache
def missing(op: str) -> str | None:
    """Why the kernels of an op cannot run on the GPU that torch sees, or None."""
    try:
        kernels(op)
    except ImportError as error:
        return f"Triton kernels missing: {error}"
    if torch.version.cuda is None:
        return "needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    return None if capability >= OLDEST else f"needs compute capability 8.0, the GPU has {capability[0]}.{capability[1]}"
