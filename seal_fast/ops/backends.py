"""Where kernels come from: two compiled extensions and Triton. All are optional; what is missing is a reason, not an error."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

# Loaded first on purpose: the extension then finds torch's OpenMP runtime already in the process and shares its threads.
import torch

OLDEST = (8, 0)
"""Compute capability of the oldest GPUs that the Triton kernels are compiled for in the tests."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets its kernels, which then take tensors on the CPU. Triton reads the variable when it is imported."""


@dataclass(frozen=True)
class Extension:
    """A compiled module, or why there is none.

    Attributes:
        name: as in `seal_fast.<name>`.
        module: the loaded module, or None. Its kernels take addresses and sizes by name and check only the names.
        reason: why it is missing; None when it is loaded.
    """

    name: str
    module: Any
    reason: str | None

    def missing(self) -> str | None:
        """Why its kernels cannot run, or None."""
        return self.reason


def load(name: str) -> Extension:
    """Load `seal_fast.<name>`; a failure is remembered with its cause."""
    try:
        return Extension(name, import_module(f"seal_fast.{name}"), None)
    except ImportError as error:
        return Extension(name, None, f"compiled extension missing: {error}")


CPU = load("_native")
CUDA = load("_native_cuda")


def triton_kernels(op: str) -> Any:
    """The module of an op's Triton kernels, imported only when a tensor asks for them. Raises ImportError without Triton."""
    return import_module(f"seal_fast.kernels.{op}")


@cache
def triton_missing(op: str) -> str | None:
    """Why the Triton kernels of an op cannot run here, or None."""
    try:
        triton_kernels(op)
    except ImportError as error:
        return f"Triton kernels missing: {error}"
    if INTERPRETED:
        return None
    if torch.version.cuda is None:
        return "needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    return None if capability >= OLDEST else f"needs compute capability 8.0, the GPU has {capability[0]}.{capability[1]}"
