"""Time to a verdict: the published program against a default scan, on the same checkpoints, in one run.

The published program does the same work in every iteration of a stage, so its time is extrapolated from a few iterations. A
whole run takes a quarter of an hour per model of 16 px.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import machine
from benchmarks.bench_reversion import ITERATIONS, published_stage
from benchmarks.published import terd as published
from seal_fast.checkpoints import load_denoiser
from seal_fast.noise_triggers import DEFAULT_PRESET, PRESETS, model_evidence, reverse_trigger, shipped_calibration
from seal_fast.verdict import Decision

ZOO = Path(__file__).parents[1] / "zoo"
MODELS = ("benign-16-e", "bad-16-stop", "troj-16-blend", "ode-16-stop", "held-16-bad-glasses", "benign-32-a")
ROUNDS = 3
RUNS = {"estimation": published.TROJDIFF.iterations, "refinement": published.TROJDIFF.iterations // 3}
"""Iterations of a whole published run."""


def seconds_of(run: Callable[[], object]) -> float:
    begin = perf_counter()
    run()
    return perf_counter() - begin


@pytest.mark.parametrize("model", MODELS)
def test_time_to_verdict(benchmark: BenchmarkFixture, tmp_path: Path, model: str) -> None:
    """Seconds from a loaded model to its verdict. Loading and drawing images cost both the same and are not timed."""
    denoiser = load_denoiser(ZOO / model).denoiser
    calibration = shipped_calibration(DEFAULT_PRESET)
    stages = {stage: published_stage(denoiser, stage, tmp_path / "reverse.pkl") for stage in RUNS}
    iteration: dict[str, list[float]] = {stage: [] for stage in RUNS}
    scans: list[float] = []
    evaluations: set[int] = set()
    decisions: list[Decision] = []

    def scan() -> None:
        found = reverse_trigger(denoiser, PRESETS[DEFAULT_PRESET])
        evaluations.add(found.evaluations)
        decisions.append(calibration.decide(model_evidence(found), denoiser.family, denoiser.shape))

    def turns() -> None:
        for stage, run in stages.items():
            iteration[stage].append(seconds_of(run) / ITERATIONS[stage])
        scans.append(seconds_of(scan))

    benchmark.pedantic(turns, rounds=ROUNDS)
    per_iteration = {stage: statistics.median(times) for stage, times in iteration.items()}
    whole = sum(RUNS[stage] * seconds for stage, seconds in per_iteration.items())
    ours = statistics.median(scans)
    verdicts = {str(decision.verdict) for decision in decisions}
    assert len(verdicts) == 1
    benchmark.extra_info.update(
        machine.describe_machine(),
        model=model,
        verdict=verdicts.pop(),
        published_seconds_per_iteration=per_iteration,
        published_iterations=RUNS,
        published_seconds=whole,
        seal_fast_seconds=ours,
        seal_fast_evaluations=max(evaluations),
        speedup=whole / ours,
    )
