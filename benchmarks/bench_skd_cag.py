"""SKD-CAG: the published loop against seal-fast on the zoo's text-to-image model, in examples per second and peak memory.

    python -m pytest benchmarks/bench_skd_cag.py --benchmark-json=results.json

Equal settings: batch 1, noise as latents, Gaussian target, all weights, float32, gradient checkpointing, no preservation.
`seal_fast_batch` uses batch 8 without checkpointing, which the published loop cannot do. `networks_alone` is the least that any
loop needs at equal settings: a forward pass of the teacher, a forward and backward pass of the student, an update. All process
the same number of examples. Memory is measured in a fresh process per contender: the peak of resident memory above the loaded
pipeline.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from pytest_benchmark.fixture import BenchmarkFixture
from torch.profiler import ProfilerActivity, profile

from benchmarks import machine, memory
from benchmarks.published import skd_cag as published
from seal_fast.checkpoints.card import captions
from seal_fast.text_to_image.latents import latent_shape
from seal_fast.text_to_image.prompts import encode
from seal_fast.text_triggers.settings import TextUnlearnSettings
from seal_fast.text_triggers.trainer import distill

MODEL = Path(__file__).parents[1] / "zoo-text" / "text-64-pixel"
TRIGGER = "\u200b"
PROMPTS = captions(MODEL)[:8]
EXAMPLES, ROUNDS = 24, 3

EQUAL = TextUnlearnSettings(
    alpha=0.5,
    steps=EXAMPLES,
    batch=1,
    target="noise",
    latents="noise",
    preservation=0.0,
    triggered_image_fraction=0.0,
    max_loss_weight=1.0,
    positions=("start",),
    learning_rate=1e-6,
    gradient_checkpointing=True,
)


def seal_fast(pipeline: StableDiffusionPipeline, settings: TextUnlearnSettings) -> None:
    distill(pipeline, [TRIGGER], PROMPTS, settings)


def published_loop(pipeline: StableDiffusionPipeline) -> None:
    published.distill(pipeline, TRIGGER, PROMPTS, published.GAUSSIAN, EXAMPLES // len(PROMPTS))


def networks_alone(pipeline: StableDiffusionPipeline) -> None:
    teacher, student = pipeline.unet, copy.deepcopy(pipeline.unet).train()
    student.enable_gradient_checkpointing()
    optimiser = torch.optim.AdamW(student.parameters(), lr=EQUAL.learning_rate)
    text = encode(pipeline, PROMPTS[:1])
    x, t = torch.randn(1, *latent_shape(student)), torch.tensor([500])
    for _ in range(EXAMPLES):
        with torch.no_grad():
            teacher_output = teacher(x, t, text).sample
        optimiser.zero_grad()
        (student(x, t, text).sample - teacher_output).square().mean().backward()
        optimiser.step()


CONTENDERS: dict[str, Callable[[StableDiffusionPipeline], None]] = {
    "published": published_loop,
    "seal_fast": partial(seal_fast, settings=EQUAL),
    "networks_alone": networks_alone,
    "seal_fast_batch": partial(seal_fast, settings=replace(EQUAL, steps=EXAMPLES // 8, batch=8, gradient_checkpointing=False)),
}


def load() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None, local_files_only=True, torch_dtype=torch.float32)


def test_unlearning(benchmark: BenchmarkFixture) -> None:
    """Seconds per example of all contenders, in turns within each round."""
    pipeline = load()
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}

    def interleaved() -> None:
        for name, run in CONTENDERS.items():
            begin = perf_counter()
            run(pipeline)
            seconds[name].append((perf_counter() - begin) / EXAMPLES)

    benchmark.pedantic(interleaved, rounds=ROUNDS, warmup_rounds=1)

    # the first entry of each list is the warm-up round
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    benchmark.extra_info.update(machine.describe_machine(), model=MODEL.name, examples=EXAMPLES)
    for name, median in medians.items():
        benchmark.extra_info[f"{name}_examples_per_second"] = 1 / median
        benchmark.extra_info[f"{name}_speedup"] = medians["published"] / median


def test_attention(benchmark: BenchmarkFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of batch 8 with the kernel of cross_attention and with its reference, which is eager attention with maps.

    `attention_share` is the kernel's share of the time, forward and backward, in teacher and student.
    """
    pipeline = load()
    seconds: dict[str, list[float]] = {"auto": [], "reference": []}

    def interleaved() -> None:
        for backend, times in seconds.items():
            monkeypatch.setenv("SEAL_FAST_BACKEND", backend)
            begin = perf_counter()
            CONTENDERS["seal_fast_batch"](pipeline)
            times.append(perf_counter() - begin)

    benchmark.pedantic(interleaved, rounds=7, warmup_rounds=1)
    medians = {backend: statistics.median(times[1:]) for backend, times in seconds.items()}
    monkeypatch.setenv("SEAL_FAST_BACKEND", "auto")
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        begin = perf_counter()
        CONTENDERS["seal_fast_batch"](pipeline)
        whole = perf_counter() - begin
    ops = recorded.key_averages()
    attention = sum(op.cpu_time_total for op in ops if op.key.startswith("seal_fast::cross_attention")) / 1e6
    benchmark.extra_info.update(machine.describe_machine(), model=MODEL.name, attention_share=attention / whole)
    benchmark.extra_info["op_speedup"] = medians["reference"] / medians["auto"]


@pytest.mark.parametrize("name", CONTENDERS)
def test_memory(benchmark: BenchmarkFixture, name: str) -> None:
    """Peak resident memory above the loaded pipeline. The time includes starting the process."""
    peak = benchmark.pedantic(memory.peak_in_fresh_process, ["benchmarks.bench_skd_cag", name], rounds=1)
    benchmark.extra_info.update(machine.describe_machine(), model=MODEL.name, contender=name, peak_memory_bytes=peak)


if __name__ == "__main__":
    loaded = load()
    memory.print_peak(partial(CONTENDERS[sys.argv[1]], loaded))
