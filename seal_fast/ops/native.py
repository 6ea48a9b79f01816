"""The compiled extensions. Both are optional: a missing or broken one is a reason, not an error."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

# Loaded first on purpose: the extension then finds torch's OpenMP runtime already in the process and shares its threads.
import torch  # noqa: F401


@dataclass(frozen=True)
class Extension:
    """A compiled module, or why there is none.

    Attributes:
        name: as in `seal_fast.<name>`.
        module: the loaded module, or None. Its functions take addresses and sizes and check neither.
        reason: why it is missing; None when it is loaded.
    """

    name: str
    module: Any
    reason: str | None


def load(name: str) -> Extension:
    """Load `seal_fast.<name>`; a failure is remembered with its cause."""
    try:
        return Extension(name, import_module(f"seal_fast.{name}"), None)
    except ImportError as error:
        return Extension(name, None, f"compiled extension missing: {error}")


CPU = load("_native")
CUDA = load("_native_cuda")
