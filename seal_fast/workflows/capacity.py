"""The device that models are scanned on, and how many are scanned at a time: what cores and memory allow."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

BASE_BYTES = 1 << 30
"""Peak memory of a scan that does not depend on the model: libraries, and the search on images of 16 px (0.98 GB together)."""
BYTES_PER_FILE_BYTE = 48
"""Additional peak memory per byte of checkpoint. Passes with a gradient store the activations of 192 images (35 times the
weights for google/ddpm-cifar10-32). Convolution weights are stored once more and, on the CPU, as two Winograd transforms of
four times their size each (outputs and gradients)."""

STREAMS = 4
"""Models at a time on a GPU. It was not measured on a GPU yet. Threads share the interpreter, so many would wait for it."""


def default_device() -> str:
    """The GPU where torch sees one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_jobs(checkpoints: Sequence[Path]) -> int:
    """Models at a time on this machine: at most one per thread of torch, or STREAMS on a GPU, and what fits into free memory.

    On two cores, two models of 16 px at a time took 6.5 s each; one after the other, on both threads, took 8.8 s.
    """
    if default_device() == "cuda":
        return jobs_that_fit(checkpoints, most=STREAMS, free=torch.cuda.mem_get_info()[0])
    return jobs_that_fit(checkpoints, most=torch.get_num_threads(), free=free_memory())


def jobs_that_fit(checkpoints: Sequence[Path], *, most: int, free: int) -> int:
    """Models at a time: at least 1, at most `most`, and no more than fit into `free` bytes.

    Every checkpoint counts as large as the largest one.
    """
    largest = max(map(bytes_on_disk, checkpoints), default=0)
    return max(1, min(most, len(checkpoints), free // memory_of(largest)))


def memory_of(file_bytes: int) -> int:
    """Bytes that scanning a checkpoint with files of this size is expected to take at most."""
    return BASE_BYTES + BYTES_PER_FILE_BYTE * file_bytes


def bytes_on_disk(checkpoint: Path) -> int:
    """Size of a checkpoint's file, or of all files in its folder; a file that cannot be read counts as empty."""
    files = [Path(folder, name) for folder, _, names in os.walk(checkpoint) for name in names] or [checkpoint]
    total = 0
    for file in files:
        with suppress(OSError):
            total += file.stat().st_size
    return total


def free_memory() -> int:
    """Bytes that this process and its children can still take, within the machine's memory and a container's limit.

    0 where the system does not say.
    """
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", _text("/proc/meminfo"), re.MULTILINE)
    machine = int(found[1]) * 1024 if found else 0
    limit, used = (_text(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    return min(machine, max(0, int(limit) - int(used))) if limit.isdigit() and used.isdigit() else machine


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
