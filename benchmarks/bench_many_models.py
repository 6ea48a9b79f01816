"""Time per model in a scan of many models, against a scan of one with all threads: copies of one benign model of 16 px.

The search has a quarter or less of the default iterations, so the cost of a process weighs more than in a real scan. A scan of
many models imports torch once more at its start (a few seconds); that is not counted.
"""

from __future__ import annotations

import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import machine
from seal_fast import scan
from seal_fast.noise_triggers import DEFAULT_PRESET, SearchSettings, shipped_calibration
from seal_fast.noise_triggers.search_settings import ActivationTestSettings, FixedPointSettings, JointInversionSettings
from seal_fast.workflows.capacity import default_jobs

MODEL = Path(__file__).parents[1] / "zoo" / "benign-16-a"
SETTINGS = SearchSettings(
    fixed_points=FixedPointSettings(power_iterations=4, fixed_point_iterations=3, candidates=1),
    inversion=JointInversionSettings(halving=((3, 12), (4, 6), (6, 2)), alternations=1),
    test=ActivationTestSettings(ancestral_steps=50),
)
ROUNDS = {1: 3, 2: 3, 4: 2, 16: 1}


@pytest.mark.parametrize("models", ROUNDS)
def test_many_models(benchmark: BenchmarkFixture, tmp_path: Path, models: int) -> None:
    """Seconds per model. Each round scans one model alone, then all of them."""
    calibration = replace(shipped_calibration(DEFAULT_PRESET), settings=SETTINGS)
    hub = [shutil.copytree(MODEL, tmp_path / f"{number:02}") for number in range(models)]
    seconds: dict[str, list[float]] = {"single": [], "many": []}

    def timed(name: str, paths: list[Path], jobs: int | None) -> None:
        begin = perf_counter()
        report = scan(paths, calibration=calibration, jobs=jobs)
        seconds[name].append((perf_counter() - begin) / len(paths))
        assert report.summary["error"] == 0

    def interleaved() -> None:
        timed("single", hub[:1], 1)
        timed("many", hub, None)

    scan(hub[:2], calibration=calibration, jobs=None)
    benchmark.pedantic(interleaved, rounds=ROUNDS[models])

    medians = {name: statistics.median(times) for name, times in seconds.items()}
    benchmark.extra_info.update(
        machine.describe_machine(),
        model=MODEL.name,
        models=models,
        jobs=default_jobs(hub),
        single_seconds=medians["single"],
        many_seconds_per_model=medians["many"],
        speedup=medians["single"] / medians["many"],
    )
