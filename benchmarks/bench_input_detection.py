"""Input detection: published (dense covariance, one input at a time) against the diagonal closed form, 3 x 32 x 32."""

from __future__ import annotations

import statistics
from time import perf_counter

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import machine
from benchmarks.published.terd import DenseInputDetector
from seal_fast.checkpoints.trigger import Trigger
from seal_fast.noise_triggers import InputDetector

ROUNDS = 9
SHAPE = (3, 32, 32)
PUBLISHED_INPUTS = 64
"""Inputs for the published loop, which takes an eighth of a second for them. Its rate does not depend on their number."""


@pytest.mark.parametrize("inputs", [PUBLISHED_INPUTS, 10_000])
def test_input_detection(benchmark: BenchmarkFixture, inputs: int) -> None:
    """Inputs per second of both detectors, timed in turns within each round. Building the detectors is not timed.

    `sum_share` is seal-fast's rate over the rate at which torch sums the same inputs in the same turns. For inputs that no
    cache holds, that is the share of memory bandwidth (measured separately, it varied from 42 to 79 GB/s within an hour).
    """
    torch.manual_seed(0)
    trigger = Trigger(torch.randn(SHAPE) / 20, 0.9 + 0.2 * torch.rand(SHAPE))
    noise = torch.randn(inputs, *SHAPE)
    x = torch.where((torch.arange(inputs) % 2 == 0)[:, None, None, None], noise, trigger.start(noise))
    published, detector = DenseInputDetector(trigger), InputDetector(trigger)
    seconds: dict[str, list[float]] = {"published": [], "seal_fast": [], "sum": []}
    repeats = max(1, 2048 // inputs)

    def interleaved() -> None:
        begin = perf_counter()
        dense = published(x[:PUBLISHED_INPUTS])
        detected = perf_counter()
        for _ in range(repeats):
            diagonal = detector(x)
        summed = perf_counter()
        for _ in range(repeats):
            x.sum()
        end = perf_counter()
        seconds["published"].append((detected - begin) / PUBLISHED_INPUTS)
        seconds["seal_fast"].append((summed - detected) / repeats / inputs)
        seconds["sum"].append((end - summed) / repeats / inputs)
        assert diagonal[:PUBLISHED_INPUTS].tolist() == dense

    benchmark.pedantic(interleaved, rounds=ROUNDS, warmup_rounds=1)

    # the first entry of each list is the warm-up round
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    benchmark.extra_info.update(
        machine.describe_machine(),
        shape=list(SHAPE),
        inputs=inputs,
        published_inputs_per_second=1 / medians["published"],
        seal_fast_inputs_per_second=1 / medians["seal_fast"],
        speedup=medians["published"] / medians["seal_fast"],
        sum_share=medians["sum"] / medians["seal_fast"],
    )
