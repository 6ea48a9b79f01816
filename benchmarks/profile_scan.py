"""Where the time of a reversion goes, op by op: in TERD's estimation, as published and by seal-fast, and in default reversions.

    python -m benchmarks.profile_scan

It writes benchmarks/results/profile.json, or profile_float32.json where the processor does not multiply bfloat16.
benchmarks.render_results shows both.

The published program runs in float32 and computes gradients of the weights. Architectures that no zoo model has get random
weights, since the cost of a pass does not depend on them. Seconds are processor time on one thread, so other work on the
machine hardly disturbs them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from diffusers import UNet2DModel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from benchmarks import machine
from benchmarks.published import terd as published
from benchmarks.table_file import write_table
from seal_fast.checkpoints import load_denoiser
from seal_fast.diffusion import VP, Denoiser
from seal_fast.noise_triggers import DEFAULT_PRESET, PRESETS, TerdSettings, reverse_trigger
from seal_fast.training import native_bfloat16

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / ("profile.json" if native_bfloat16(torch.device("cpu")) else "profile_float32.json")
RUNS, ITERATIONS = 3, 4
"""A run has several iterations, because exchanging parts of the network once per reversion costs a good part of one."""
PARTS = {
    "convolutions": ("convolution",),
    "norms and activations": ("group_norm", "silu"),
    "attention and linear layers": ("scaled_dot_product", "softmax", "bmm", "addmm", "aten::mm"),
    "sampler": ("seal_fast::sampler_step",),
    "noise, loss and update": ("seal_fast::reversed_loss", "randn", "normal_", "randint", "random_", "foreach", "SGD"),
}
"""Substrings of op names; the first match decides. Other ops are copies and sums; time outside of ops is Python."""
ELEMENTWISE, PYTHON = "copies and sums", "Python"
SCANNED = ("benign-16-a", "ode-16-stop", "benign-32-a")


@dataclass(frozen=True)
class Case:
    """An architecture, and the pairs of images that an iteration denoises."""

    name: str
    batch: int
    denoiser: Callable[[], Denoiser]


def ddpm(size: int) -> Denoiser:
    """google/ddpm-cifar10-32's UNet, 35.7 million parameters, at any size; random weights."""
    attending = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    network: Any = UNet2DModel(
        sample_size=size,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=attending,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(attending)),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    return Denoiser(network, VP.linear(), (3, size, size))


def zoo(name: str) -> Denoiser:
    return load_denoiser(ROOT / "zoo" / name).denoiser


CASES = (
    Case("zoo, 16 px", 16, lambda: zoo("benign-16-a")),
    Case("zoo, 32 px", 16, lambda: zoo("benign-32-a")),
    Case("ddpm-cifar10, 32 px", 2, lambda: ddpm(32)),
    Case("ddpm-cifar10, 64 px", 1, lambda: ddpm(64)),
)


def loops(denoiser: Denoiser, batch: int, folder: str) -> dict[str, Callable[[], object]]:
    """Runs of ITERATIONS iterations by program."""
    theirs = replace(published.TROJDIFF, batch=batch)
    start = published.initial_trigger(denoiser, theirs)
    ours = TerdSettings(estimation_iterations=ITERATIONS, refinement_iterations=0, batch=batch)
    return {
        "published": lambda: published.estimate(denoiser, start, theirs, ITERATIONS, Path(folder) / "reverse.pkl"),
        "seal-fast": lambda: reverse_trigger(denoiser, ours),
    }


@register_flop_formula(torch.ops.seal_fast.winograd_convolution)
def plain_flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    """FLOPs of the plain sum, as torch counts them for any other convolution."""
    images, channels, height, width = x
    return 2 * 9 * channels * weight[2] * height * width * images


def part_of(op: str) -> str:
    return next((part for part, names in PARTS.items() if any(name in op for name in names)), ELEMENTWISE)


def split(run: Callable[[], object]) -> dict[str, float]:
    """Share of one run's time per part."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        begin = perf_counter()
        run()
        whole = perf_counter() - begin
    shares = dict.fromkeys((*PARTS, ELEMENTWISE, PYTHON), 0.0)
    for op in recorded.key_averages():
        if op.key.startswith(("aten::", "seal_fast::")):
            shares[part_of(op.key)] += op.self_cpu_time_total / 1e6 / whole
    shares[PYTHON] = 1 - sum(shares.values())
    return shares


def flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def matrix_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, the best of a few."""
    matrix = torch.randn(machine.GEMM_SIZE, machine.GEMM_SIZE).to(dtype)
    seconds = []
    for _ in range(6):
        begin = process_time()
        matrix @ matrix
        seconds.append(process_time() - begin)
    return 2 * machine.GEMM_SIZE**3 / min(seconds)


def profiled(case: Case) -> dict[str, Any]:
    """Both programs in turns; the fastest run of each counts."""
    denoiser = case.denoiser()
    with tempfile.TemporaryDirectory() as folder:
        contenders = loops(denoiser, case.batch, folder)
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(RUNS + 1):
            for name, run in contenders.items():
                begin = process_time()
                run()
                seconds[name].append(process_time() - begin)
        measured = {
            name: {"seconds": min(seconds[name][1:]), "flops": flops(run), "shares": split(run)}
            for name, run in contenders.items()
        }
    parameters = sum(p.numel() for p in denoiser.network.parameters())
    return {"name": case.name, "images": 2 * case.batch * ITERATIONS, "parameters": parameters, "loops": measured}


def scanned(name: str) -> dict[str, Any]:
    """A whole default reversion: seconds per stage, and shares per part of a second, profiled one."""
    denoiser, settings, last = zoo(name), PRESETS[DEFAULT_PRESET], process_time()
    stages: dict[str, float] = {}

    def on_step(stage: str, iteration: int, total: int, loss: float) -> None:
        nonlocal last
        now = process_time()
        stages[stage] = stages.get(stage, 0.0) + now - last
        last = now

    evaluations = reverse_trigger(denoiser, settings, on_step=on_step).evaluations
    return {
        "name": name,
        "evaluations": evaluations,
        "stages": stages,
        "shares": split(lambda: reverse_trigger(denoiser, settings)),
    }


def main() -> None:
    torch.set_num_threads(1)
    content = {
        "command": "python -m benchmarks.profile_scan",
        "machine": {"processor": machine.processor_name(), "commit": machine.commit(), "torch": torch.__version__},
        "float32_matrix_rate": matrix_rate(torch.float32),
        "bfloat16_matrix_rate": matrix_rate(torch.bfloat16),
        "cases": [profiled(case) for case in CASES],
        "scans": [scanned(name) for name in SCANNED],
    }
    write_table(RESULT, content)


if __name__ == "__main__":
    main()
