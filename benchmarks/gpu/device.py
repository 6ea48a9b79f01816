"""Limits of the device that the GPU benchmarks run on, and the time and memory of work on it.

The same code runs on a CPU, which proves only that the code runs.
"""

from __future__ import annotations

import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import machine

Run = Callable[[], object]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Scale:
    """How large the benchmarks are.

    Attributes:
        tiny: whether they only prove that they run.
        rounds: timed calls of every contender, in turns.
        flush_bytes: bytes written before every timed call, more than any cache holds.
        copied_bytes: size of the copy that measures the bandwidth.
        gemm: side of the square product that measures the arithmetic.
    """

    tiny: bool
    rounds: int
    flush_bytes: int
    copied_bytes: int
    gemm: int


REAL = Scale(False, 15, 256 * 2**20, 2**31, 8192)
TINY = Scale(True, 2, 2**20, 2**22, 128)


@dataclass(frozen=True)
class Limits:
    """Measured limits of this device.

    Attributes:
        bandwidth: bytes/s of a copy, read and written bytes counted.
        gemm: FLOP/s of a square matrix product of random numbers, by dtype; float32 without tf32.
    """

    bandwidth: float
    gemm: dict[str, float]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds_of(run: Run) -> float:
    """Seconds of one call, between events on the GPU's stream or by the host's clock on a CPU."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def medians(contenders: Mapping[str, Run], scale: Scale, warm_ups: int = 2) -> dict[str, float]:
    """Median seconds of one call of each contender, in turns, with none of its inputs left in a cache.

    The device is still emptying its caches when a call is made, so the time of a launch does not count.
    """
    flush = torch.empty(scale.flush_bytes, dtype=torch.int8, device=device())
    for run in contenders.values():
        for _ in range(warm_ups):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(scale.rounds):
        for name, run in contenders.items():
            flush.zero_()
            seconds[name].append(seconds_of(run))
    return {name: statistics.median(times) for name, times in seconds.items()}


def speedups(seconds: Mapping[str, float], baseline: str) -> dict[str, float]:
    """Speed-up of each contender over the baseline; empty if the baseline did not run."""
    return {name: seconds[baseline] / taken for name, taken in seconds.items()} if baseline in seconds else {}


def peak_bytes(run: Run) -> int | None:
    """Peak bytes that `run` allocates on the GPU, above what was allocated before; None on a CPU."""
    if not torch.cuda.is_available():
        run()
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure_limits(scale: Scale) -> Limits:
    source = torch.ones(scale.copied_bytes // 4, device=device())
    target = torch.empty_like(source)
    contenders: dict[str, Run] = {"copy": partial(target.copy_, source)}
    for name, dtype in DTYPES.items():
        # zeros would multiply faster
        left, right = (torch.randn(scale.gemm, scale.gemm, device=device()).to(dtype) for _ in range(2))
        contenders[name] = partial(torch.matmul, left, right)
    taken = medians(contenders, scale)
    return Limits(2 * source.nbytes / taken["copy"], {name: 2 * scale.gemm**3 / taken[name] for name in DTYPES})


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def describe(scale: Scale) -> dict[str, Any]:
    """The device, the libraries and the limits."""
    try:
        import triton
    except ImportError:
        triton = None
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else machine.processor_name(),
        "capability": list(torch.cuda.get_device_capability()) if on_gpu else None,
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": None if triton is None else triton.__version__,
        "commit": machine.commit(),
        "limits": asdict(measure_limits(scale)),
    }
