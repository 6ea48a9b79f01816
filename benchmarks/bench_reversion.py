"""Time of a reversion iteration: the published loop against seal-fast, both stages, same model and batch.

On CPUs the published loop runs in float32. seal-fast runs in float32 and by default, in bfloat16 where the processor has it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import machine, memory
from benchmarks.published import terd as published
from seal_fast.checkpoints import load_denoiser
from seal_fast.diffusion import Denoiser
from seal_fast.noise_triggers import TerdSettings, reverse_trigger

ZOO = Path(__file__).parents[1] / "zoo"
MODEL, LARGER_MODEL = ZOO / "benign-16-a", ZOO / "benign-32-a"
ITERATIONS = {"estimation": 24, "refinement": 8}
"""Enough iterations that exchanging parts of the network once per reversion hardly counts (with a quarter of them both speedups
were 2.4, not 2.6)."""
ROUNDS = 5


def seal_fast_stage(denoiser: Denoiser, stage: str, half_precision: bool) -> Callable[[], object]:
    settings = replace(
        TerdSettings(),
        estimation_iterations=ITERATIONS[stage] if stage == "estimation" else 0,
        refinement_iterations=ITERATIONS[stage] if stage == "refinement" else 0,
        half_precision=half_precision,
    )
    return lambda: reverse_trigger(denoiser, settings)


def published_stage(denoiser: Denoiser, stage: str, path: Path) -> Callable[[], object]:
    settings = replace(published.TROJDIFF, iterations=ITERATIONS["estimation"])
    start = published.initial_trigger(denoiser, settings)
    if stage == "estimation":
        return lambda: published.estimate(denoiser, start, settings, ITERATIONS[stage], path)
    return lambda: published.refine(denoiser, start, settings, ITERATIONS[stage], path)


def contenders_of(denoiser: Denoiser, stage: str, path: Path) -> dict[str, Callable[[], object]]:
    return {
        "published": published_stage(denoiser, stage, path),
        "seal_fast_float32": seal_fast_stage(denoiser, stage, half_precision=False),
        "seal_fast": seal_fast_stage(denoiser, stage, half_precision=True),
    }


@pytest.mark.parametrize("stage", ["estimation", "refinement"])
def test_reversion(benchmark: BenchmarkFixture, tmp_path: Path, stage: str) -> None:
    """Seconds per iteration of all contenders, in turns within each round."""
    denoiser = load_denoiser(MODEL).denoiser
    contenders = contenders_of(denoiser, stage, tmp_path / "reverse.pkl")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}

    def interleaved() -> None:
        for name, run in contenders.items():
            begin = perf_counter()
            run()
            seconds[name].append((perf_counter() - begin) / ITERATIONS[stage])

    benchmark.pedantic(interleaved, rounds=ROUNDS, warmup_rounds=1)

    # the first entry of each list is the warm-up round
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    benchmark.extra_info.update(
        machine.describe_machine(),
        stage=stage,
        model=MODEL.name,
        batch=TerdSettings().batch,
        seconds_per_iteration=medians,
        speedup_float32=medians["published"] / medians["seal_fast_float32"],
        speedup=medians["published"] / medians["seal_fast"],
    )


@pytest.mark.parametrize("name", ["published", "seal_fast_float32", "seal_fast"])
def test_refinement_memory(benchmark: BenchmarkFixture, name: str) -> None:
    """Peak resident memory of refinement at 32 px above the loaded model. The time includes starting the process."""
    peak = benchmark.pedantic(memory.peak_in_fresh_process, ["benchmarks.bench_reversion", name], rounds=1)
    benchmark.extra_info.update(model=LARGER_MODEL.name, contender=name, peak_memory_bytes=peak)


if __name__ == "__main__":
    loaded = load_denoiser(LARGER_MODEL).denoiser
    with tempfile.TemporaryDirectory() as folder:
        memory.print_peak(contenders_of(loaded, "refinement", Path(folder) / "reverse.pkl")[sys.argv[1]])
