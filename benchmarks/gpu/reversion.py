"""TERD as published on the GPU: the released program against seal-fast, with one model and with several at once.

The model has the architecture of google/ddpm-cifar10-32 (35.7 million parameters) and random weights, which cost as much as
trained ones. Every contender runs a few iterations. seal-fast's first READ_EVERY iterations are not timed, as they warm up or
record a CUDA graph. The time of a whole reversion is extrapolated from an iteration to the published number of iterations.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from benchmarks.gpu.device import Scale, device, peak_bytes, speedups
from benchmarks.published import terd as published
from seal_fast.acceleration.cuda_graph import capture_graph
from seal_fast.acceleration.graph_cache import GraphCache, GraphCachedNetwork
from seal_fast.diffusion import VP, Denoiser, sample
from seal_fast.noise_triggers import SearchSettings, TerdSettings
from seal_fast.noise_triggers.joint_inversion import JointInversion
from seal_fast.noise_triggers.probe import Probe
from seal_fast.noise_triggers.terd import READ_EVERY, descend_reversed_loss

PUBLISHED_ITERATIONS = {"estimation": 3000, "refinement": 1000}
TIMED_ITERATIONS = 16
ROUNDS = 3
MODELS = (1, 4, 16)
PATIENCE = 60.0
"""Seconds that a model waits for the others, one of which may have failed."""

Seconds = Callable[[], float]
"""A run that returns its seconds per iteration."""


def cifar_unet(sample_size: int = 32, width: int = 128, groups: int = 32) -> UNet2DModel:
    """google/ddpm-cifar10-32's architecture."""
    return UNet2DModel(
        sample_size=sample_size,
        block_out_channels=(width, 2 * width, 2 * width, 2 * width),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_num_groups=groups,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )


def denoiser(scale: Scale, seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    size = 8 if scale.tiny else 32
    unet: Any = cifar_unet(size, 8, 4) if scale.tiny else cifar_unet()
    return Denoiser(unet.to(device()), VP.linear(), (3, size, size))


def warm_up(scale: Scale) -> int:
    """Iterations of seal-fast that are not timed."""
    return 1 if scale.tiny else READ_EVERY


def timed_iterations(scale: Scale) -> int:
    return 1 if scale.tiny else TIMED_ITERATIONS


def settings_of(stage: str, scale: Scale, half: bool) -> TerdSettings:
    iterations = warm_up(scale) + timed_iterations(scale)
    settings = replace(
        TerdSettings(),
        estimation_iterations=iterations if stage == "estimation" else 0,
        refinement_iterations=iterations if stage == "refinement" else 0,
        half_precision=half,
    )
    return replace(settings, batch=1, sampler_steps=2) if scale.tiny else settings


def released(model: Denoiser, stage: str, program: published.Settings, settings: TerdSettings, path: Path) -> float:
    """Seconds per iteration of the released loop. Each iteration ends by writing a file, so it waits for the GPU."""
    used, timed = replace(program, batch=settings.batch), settings.estimation_iterations + settings.refinement_iterations
    loop = published.estimate if stage == "estimation" else published.refine
    began = time.perf_counter()
    loop(model, published.initial_trigger(model, used), used, timed, path)
    return (time.perf_counter() - began) / timed


def steady(
    model: Denoiser, settings: TerdSettings, timed: int, capture: bool, ready: Callable[[], object] = lambda: None
) -> float:
    """Seconds per iteration of seal-fast over the last `timed`; `ready` is called before them."""
    began, untimed = 0.0, settings.estimation_iterations + settings.refinement_iterations - timed

    def on_step(stage: str, iteration: int, total: int, loss: float) -> None:
        nonlocal began
        if iteration == untimed:
            ready()
            began = time.perf_counter()

    descend_reversed_loss(model, settings, on_step=on_step, record=capture_graph if capture else None)
    return (time.perf_counter() - began) / timed


def append_seconds(times: list[float], run: Seconds) -> None:
    times.append(run())


def measured(contenders: Mapping[str, Seconds], rounds: int) -> dict[str, Any]:
    """Least seconds per iteration over all rounds, in turns; memory in the first round; errors of those that failed."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: dict[str, int | None] = {}
    failed: dict[str, str] = {}
    for turn in range(rounds):
        for name, run in contenders.items():
            if name in failed:
                continue
            try:
                keep = partial(append_seconds, seconds[name], run)
                if turn == 0:
                    peaks[name] = peak_bytes(keep)
                else:
                    keep()
            except RuntimeError as error:
                failed[name] = (str(error) or type(error).__name__).splitlines()[0]
    taken = {name: min(times) for name, times in seconds.items() if times}
    return {"seconds_per_iteration": taken, "peak_bytes": peaks, "failed": failed}


def stage_row(model: Denoiser, stage: str, scale: Scale, path: Path) -> dict[str, Any]:
    full, half = (settings_of(stage, scale, precision) for precision in (False, True))
    timed = timed_iterations(scale)
    contenders: dict[str, Seconds] = {
        "published_float32": partial(released, model, stage, published.TROJDIFF, full, path),
        "published_float16": partial(released, model, stage, published.BADDIFFUSION, full, path),
        "seal_fast_float32": partial(steady, model, full, timed, False),
        "seal_fast_bfloat16": partial(steady, model, half, timed, False),
    }
    if torch.cuda.is_available():
        contenders["seal_fast_float32_graph"] = partial(steady, model, full, timed, True)
        contenders["seal_fast_bfloat16_graph"] = partial(steady, model, half, timed, True)
    found = measured(contenders, 1 if scale.tiny else ROUNDS)
    taken = found["seconds_per_iteration"]
    return {
        "stage": stage,
        "batch": full.batch,
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "timed_iterations": timed,
        **found,
        "speedups": speedups(taken, "published_float32"),
        "extrapolated_seconds": {name: PUBLISHED_ITERATIONS[stage] * seconds for name, seconds in taken.items()},
    }


def sampled(model: Denoiser, images: int, steps: int) -> float:
    """Seconds per ancestral step of the default activation test under bfloat16, after a first run that warms up or records."""
    start = torch.randn(images, *model.shape, device=device())

    def run() -> None:
        with torch.no_grad(), torch.autocast(device().type, torch.bfloat16):
            sample(model, start, "ddpm", steps)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    run()
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) / steps


def sampling_row(model: Denoiser, scale: Scale) -> dict[str, Any]:
    """Sampling with and without CUDA graphs in the default search; the released program has no such search."""
    settings = SearchSettings()
    images, steps = (1, 2) if scale.tiny else (settings.test.samples, settings.test.ancestral_steps)
    contenders: dict[str, Seconds] = {"seal_fast_bfloat16": partial(sampled, model, images, steps)}
    if torch.cuda.is_available():
        graphs = replace(model, network=GraphCachedNetwork(model.network, GraphCache()))
        contenders["seal_fast_bfloat16_graph"] = partial(sampled, graphs, images, steps)
    found = measured(contenders, 1 if scale.tiny else ROUNDS)
    return {"stage": "sampling", "batch": images, "timed_iterations": steps, **found, "speedups": {}}


def descended(model: Denoiser, settings: SearchSettings, untimed: int, timed: int, recorded: bool) -> float:
    """Seconds per iteration of the default joint inversion after the `untimed` ones, in which it is recorded."""
    probe = Probe(model, 0, settings.half_precision)
    if not recorded:
        probe.graphs = None
    inversion, times = JointInversion(probe, settings), [0.0]
    inversion.descend(inversion.starts(), untimed + timed, lambda loss: times.append(time.perf_counter()))
    return (times[-1] - times[untimed]) / timed


def descent_row(model: Denoiser, scale: Scale) -> dict[str, Any]:
    """An iteration with a gradient, without and with a CUDA graph."""
    settings = SearchSettings()
    brief = replace(settings, attack_loss=replace(settings.attack_loss, timesteps=1))
    settings = brief if scale.tiny else settings
    untimed, timed = warm_up(scale), timed_iterations(scale)
    contenders: dict[str, Seconds] = {"seal_fast_bfloat16": partial(descended, model, settings, untimed, timed, False)}
    if torch.cuda.is_available():
        contenders["seal_fast_bfloat16_graph"] = partial(descended, model, settings, untimed, timed, True)
    found = measured(contenders, 1 if scale.tiny else ROUNDS)
    return {"stage": "descent", "batch": settings.attack_loss.timesteps, "timed_iterations": timed, **found, "speedups": {}}


def one_after_another(models: list[Denoiser], settings: TerdSettings, timed: int, capture: bool) -> float:
    return sum(steady(model, settings, timed, capture) for model in models) / len(models)


def at_once(models: list[Denoiser], settings: TerdSettings, timed: int, capture: bool) -> float:
    """All models at once, each in a thread and stream of its own, timed from when all are ready."""
    gate = threading.Barrier(len(models), timeout=PATIENCE)

    def on_own_stream(model: Denoiser) -> float:
        with torch.cuda.stream(torch.cuda.Stream() if torch.cuda.is_available() else None):
            return steady(model, settings, timed, capture, gate.wait)

    with ThreadPoolExecutor(len(models)) as pool:
        slowest = max(pool.map(on_own_stream, models))
    return slowest / len(models)


def models_row(count: int, scale: Scale) -> dict[str, Any]:
    """Estimations of several models, one after another or at once: seconds per iteration and model."""
    models = [denoiser(scale, seed) for seed in range(count)]
    settings, timed = settings_of("estimation", scale, True), timed_iterations(scale)
    contenders: dict[str, Seconds] = {
        "one_after_another": partial(one_after_another, models, settings, timed, False),
        "threads_and_streams": partial(at_once, models, settings, timed, False),
    }
    if torch.cuda.is_available():
        contenders["graphs_one_after_another"] = partial(one_after_another, models, settings, timed, True)
        contenders["graphs_threads_and_streams"] = partial(at_once, models, settings, timed, True)
    found = measured(contenders, 1 if scale.tiny else 2)
    taken = found["seconds_per_iteration"]
    return {"models": count, "batch": settings.batch, **found, "speedups": speedups(taken, "one_after_another")}


def measure(scale: Scale) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        model = denoiser(scale)
        for stage in PUBLISHED_ITERATIONS:
            yield stage_row(model, stage, scale, Path(folder) / "reverse.pkl")
    yield sampling_row(model, scale)
    yield descent_row(model, scale)


def measure_models(scale: Scale) -> Iterator[dict[str, Any]]:
    for count in (1, 2) if scale.tiny else MODELS:
        yield models_row(count, scale)
