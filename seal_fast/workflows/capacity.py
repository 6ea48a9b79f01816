"""How many models are scanned at a time: what cores and memory allow."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

BASE_BYTES = 1 << 30
"""Of one scan whatever its model: libraries, and the search on images of 16 px, which took 0.98 GB together."""
BYTES_PER_FILE_BYTE = 48
"""What the search takes beyond that per byte of the checkpoint's files: its passes with a gradient keep the activations of 192
images, for google/ddpm-cifar10-32's network 35 times its weights; and of those weights the convolutions' are kept once more,
and on the CPU transformed, in four times as many numbers for outputs and as many for gradients."""

STREAMS = 4
"""Models at a time on a GPU. Not measured on one yet: threads share the interpreter, so many would wait for it, not the GPU."""


def default_jobs(checkpoints: Sequence[Path]) -> int:
    """Models at a time: one per thread of torch, or STREAMS on a GPU; no more than fit into free memory, were all the largest.

    On two cores two models of 16 px at a time took 6.5 s each, and one after the other on both threads 8.8 s.
    """
    on_gpu = torch.cuda.is_available()
    most, free = (STREAMS, torch.cuda.mem_get_info()[0]) if on_gpu else (torch.get_num_threads(), free_memory())
    largest = max(map(bytes_on_disk, checkpoints), default=0)
    return max(1, min(most, len(checkpoints), free // memory_of(largest)))


def memory_of(file_bytes: int) -> int:
    """Bytes that scanning a checkpoint with files of this size is expected to take at most."""
    return BASE_BYTES + BYTES_PER_FILE_BYTE * file_bytes


def bytes_on_disk(checkpoint: Path) -> int:
    """Size of a checkpoint's file, or of all files in its folder; what cannot be read counts as nothing."""
    files = [Path(folder, name) for folder, _, names in os.walk(checkpoint) for name in names] or [checkpoint]
    total = 0
    for file in files:
        with suppress(OSError):
            total += file.stat().st_size
    return total


def free_memory() -> int:
    """Bytes this process and its children could still take: of the machine and, in a container, of its limit.

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
