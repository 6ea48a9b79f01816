"""Input detection: published (dense covariance, one input at a time) against the diagonal closed form, 3 x 32 x 32."""

from __future__ import annotations

import statistics
from time import perf_counter

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.published.terd import DenseInputDetector
from seal_fast.diffusion import Trigger
from seal_fast.ops import gaussian_log_ratio

INPUTS, ROUNDS = 64, 7
SHAPE = (3, 32, 32)


def test_input_detection(benchmark: BenchmarkFixture) -> None:
    """Rates in inputs per second, both contenders timed in turns within each round; building the detectors is not timed."""
    torch.manual_seed(0)
    trigger = Trigger(torch.randn(SHAPE) / 20, 0.9 + 0.2 * torch.rand(SHAPE))
    clean = torch.randn(INPUTS // 2, *SHAPE)
    inputs = torch.cat([clean, trigger.start(torch.randn(INPUTS // 2, *SHAPE))])
    published = DenseInputDetector(trigger)
    seconds: dict[str, list[float]] = {"published": [], "seal_fast": []}
    verdicts: list[list[bool]] = []

    def interleaved() -> None:
        begin = perf_counter()
        dense = published(inputs)
        middle = perf_counter()
        diagonal = (gaussian_log_ratio(inputs, trigger.mu[None], trigger.gamma[None])[:, 0] > 0).tolist()
        end = perf_counter()
        seconds["published"].append(middle - begin)
        seconds["seal_fast"].append(end - middle)
        verdicts.extend([dense, diagonal])

    benchmark.pedantic(interleaved, rounds=ROUNDS, warmup_rounds=1)

    assert all(v == verdicts[0] for v in verdicts)
    # the first entry of each list is the warm-up round
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    benchmark.extra_info.update(
        {
            "shape": list(SHAPE),
            "inputs": INPUTS,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "published_inputs_per_second": INPUTS / medians["published"],
            "seal_fast_inputs_per_second": INPUTS / medians["seal_fast"],
            "speedup": medians["published"] / medians["seal_fast"],
        }
    )
