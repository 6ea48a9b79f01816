"""The version of seal-fast, the machine and the libraries that made a result."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from seal_fast.version import __version__

LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "scikit-learn", "triton")


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Model name of the CPU, or its architecture where the system does not say."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def tool() -> dict[str, str]:
    """Name and version of seal-fast."""
    return {"name": "seal-fast", "version": __version__}


def environment() -> dict[str, Any]:
    """Versions, device and thread count; None for a library that is not installed."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{library: _version(library) for library in LIBRARIES},
    }


def openmp_libraries() -> list[str]:
    """OpenMP runtimes that this process has loaded (Linux only). Threads of more than one compete for the same cores."""
    try:
        maps = Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        return []
    return sorted(set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so[^/\s]*", maps)))
