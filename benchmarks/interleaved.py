"""Contenders timed in turns, because on a shared machine only times measured side by side compare."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import machine

ROUNDS = 15


def compare(benchmark: BenchmarkFixture, contenders: Mapping[str, Callable[[], object]], repeats: int, **facts: Any) -> None:
    """Report median seconds per call of each contender, and its speed-up over the first one; `repeats` calls per turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}

    def turns() -> None:
        for name, run in contenders.items():
            begin = perf_counter()
            for _ in range(repeats):
                run()
            seconds[name].append((perf_counter() - begin) / repeats)

    benchmark.pedantic(turns, rounds=ROUNDS, warmup_rounds=1)
    # the first entry of each list is the warm-up round
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    first = next(iter(contenders))
    speedups = {f"{name}_speedup": medians[first] / median for name, median in medians.items() if name != first}
    benchmark.extra_info.update(machine.describe_machine(), seconds=medians, **speedups, **facts)
