"""Cost of a reversion iteration: published loop against seal-fast, both stages, same model and batch, float32 both."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.published import terd as published
from seal_fast.checkpoints import load_denoiser
from seal_fast.diffusion import Denoiser
from seal_fast.terd import ReversionSettings, reverse_trigger

MODEL = Path(__file__).parents[1] / "zoo" / "benign-16-a"
ITERATIONS = {"estimation": 6, "refinement": 2}
ROUNDS = 5


def seal_fast_stage(denoiser: Denoiser, stage: str) -> Callable[[], object]:
    settings = replace(
        ReversionSettings(),
        estimation_iterations=ITERATIONS[stage] if stage == "estimation" else 0,
        refinement_iterations=ITERATIONS[stage] if stage == "refinement" else 0,
        half_precision=False,
    )
    return lambda: reverse_trigger(denoiser, settings)


def published_stage(denoiser: Denoiser, stage: str, path: Path) -> Callable[[], object]:
    settings = replace(published.TROJDIFF, iterations=ITERATIONS["estimation"])
    guess = published.first_guess(denoiser, settings)
    if stage == "estimation":
        return lambda: published.estimate(denoiser, guess, settings, ITERATIONS[stage], path)
    return lambda: published.refine(denoiser, guess, settings, ITERATIONS[stage], path)


@pytest.mark.parametrize("stage", ["estimation", "refinement"])
def test_reversion(benchmark: BenchmarkFixture, tmp_path: Path, stage: str) -> None:
    """Seconds per iteration, both contenders in turns within each round."""
    denoiser = load_denoiser(MODEL).denoiser
    contenders = {
        "published": published_stage(denoiser, stage, tmp_path / "reverse.pkl"),
        "seal_fast": seal_fast_stage(denoiser, stage),
    }
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
        {
            "stage": stage,
            "model": MODEL.name,
            "batch": ReversionSettings().batch,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "published_seconds_per_iteration": medians["published"],
            "seal_fast_seconds_per_iteration": medians["seal_fast"],
            "speedup": medians["published"] / medians["seal_fast"],
        }
    )
