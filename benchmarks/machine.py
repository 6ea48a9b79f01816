"""The machine a benchmark ran on: what it is, and the limits a kernel is measured against."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

BYTES = 256 * 2**20
"""Large enough to leave every cache."""

GEMM_SIZE = 1024


@dataclass(frozen=True)
class Machine:
    """A machine's description and its limits, measured with `threads` threads.

    Attributes:
        processor: model name.
        threads: torch's thread count, which the kernels use too.
        torch: version of torch.
        commit: commit of the working tree, "-dirty" if it has changes beside results; "unknown" outside a checkout.
        read_bandwidth: bytes/s of a sum over an array larger than the caches.
        copy_bandwidth: bytes/s of a copy, read and written bytes counted.
        gemm_rate: float32 FLOP/s of a square matrix product.
        bfloat16_gemm_rate: bfloat16 FLOP/s, likewise.
    """

    processor: str
    threads: int
    torch: str
    commit: str
    read_bandwidth: float
    copy_bandwidth: float
    gemm_rate: float
    bfloat16_gemm_rate: float


def best_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Shortest of `repeats` runs after a warm-up. A limit is what the machine reaches undisturbed."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


RESULTS = ("benchmarks/results", "docs/results.md", "docs/profile.md", "docs/triggers")
"""What measuring writes: changes there do not change what is measured."""


def commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    status = [*git, "status", "--porcelain", "--", ":/", *(f":(top,exclude){path}" for path in RESULTS)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if dirty else head


@cache
def measure() -> Machine:
    """A description of this machine with its limits, measured once per process (about two seconds)."""
    source = torch.ones(BYTES // 4)
    target = torch.empty_like(source)
    matrix = torch.randn(GEMM_SIZE, GEMM_SIZE)
    half = matrix.bfloat16()
    return Machine(
        processor=processor_name(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        commit=commit(),
        read_bandwidth=BYTES / best_seconds(source.sum),
        copy_bandwidth=2 * BYTES / best_seconds(lambda: target.copy_(source)),
        gemm_rate=2 * GEMM_SIZE**3 / best_seconds(lambda: matrix @ matrix),
        bfloat16_gemm_rate=2 * GEMM_SIZE**3 / best_seconds(lambda: half @ half),
    )


def describe_machine() -> dict[str, object]:
    """`measure()` as JSON holds it."""
    return asdict(measure())
