"""TERD's reversion on a GPU: as on the CPU, recorded as a graph, and beside others; and what a recording needs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from benchmarks.gpu.scanning import BRIEF as BRIEF_SEARCH
from seal_fast.acceleration import graph_cache
from seal_fast.acceleration.adam import initial_moments
from seal_fast.acceleration.cuda_graph import Record, capture_graph, verified_graph
from seal_fast.diffusion import EDM, SAMPLERS, VE, VP, Denoiser, NoiseProcess, sample
from seal_fast.noise_triggers import (
    Reversion,
    TerdSettings,
    fixed_points,
    joint_inversion,
    reverse_trigger,
    target_refinement,
    terd,
)
from seal_fast.noise_triggers.probe import Iteration, Probe
from seal_fast.noise_triggers.terd import READ_EVERY, _Iteration, _Reverter, descend_reversed_loss
from seal_fast.noise_triggers.unlearning import NoiseUnlearnSettings, unlearn_denoiser
from tests.acceleration.recording import OnTheHost, fails

BRIEF = TerdSettings(
    estimation_iterations=READ_EVERY + 3, refinement_iterations=2, batch=2, sampler_steps=2, half_precision=False
)
REPEATED = replace(
    BRIEF_SEARCH,
    search_iterations=6,
    polish_iterations=6,
    race=((6, 1),),
    climb_iterations=6,
    climb_turns=1,
    half_precision=False,
)
"""Iterations often enough to be recorded, and no more."""
PROCESSES = {"VP": VP.linear, "VE": VE.geometric, "EDM": EDM.karras}


def denoiser(device: str, process: Callable[[], NoiseProcess] = VP.linear) -> Denoiser:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    return Denoiser(unet.to(device), process(), (3, 8, 8))


def assert_alike(got: Reversion, want: Reversion) -> None:
    assert got.finite == want.finite
    assert got.evaluations == want.evaluations
    assert got.loss == pytest.approx(want.loss, rel=1e-2, nan_ok=True)
    for one, other in ((got.trigger.mu, want.trigger.mu), (got.trigger.gamma, want.trigger.gamma)):
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("process", PROCESSES)
def test_an_iteration_can_be_recorded(process: str) -> None:
    """Tensors without data stand in for those of a GPU: to wait for their values, or to mix them with the CPU's, fails."""
    reverter = _Reverter(denoiser("meta", PROCESSES[process]), BRIEF, 0)
    for stage in reverter.stages:
        draws = [drawn.to("meta") for drawn in stage.draw()]
        (gradient,) = torch.autograd.grad(stage.loss_of(draws), reverter.mu)
        assert gradient.device.type == "meta"
    iteration = _Iteration(reverter, stage, draws)
    assert all(x.device.type == "meta" for x in (*iteration.state, *iteration.draws, iteration.rate))


@pytest.mark.parametrize("process", PROCESSES)
def test_an_iteration_of_the_default_search_can_be_recorded(process: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Likewise; of the descents all but Adam's step, whose form for GPUs takes no other tensors."""
    monkeypatch.setattr(Probe, "precision", lambda probe: nullcontext())
    for module in (joint_inversion, target_refinement):
        monkeypatch.setattr(module, "adam_step", lambda variables, gradients, moments, rate: (*gradients, *moments))
    probe = Probe(denoiser("meta", PROCESSES[process]), torch.Generator(), half_precision=False)
    t, eps, images = (
        torch.empty(6, dtype=torch.int64, device="meta"),
        *(torch.empty(n, 3, 8, 8, device="meta") for n in (2, 3)),
    )
    uniform, number, coefficients = (torch.empty(shape, device="meta") for shape in ((3, 3, 1, 1), (), (4, 2)))
    fit = t, eps, coefficients, images, images
    moments = initial_moments([images, images])
    iterations: list[tuple[Iteration, tuple[Tensor, ...]]] = [
        (fixed_points._search_iteration, (t, eps, uniform, uniform, images)),
        (fixed_points._polish_iteration, (t, eps, number, images, images)),
        (fixed_points._missed, (t, eps, uniform, images, images)),
        (joint_inversion.ask, fit),
        (joint_inversion._Descent(0.1), (*fit, *moments)),
        (target_refinement._Climb(0.1), (*fit, *moments[:3])),
    ]
    for iteration, inputs in iterations:
        assert all(x.device.type == "meta" for x in iteration(probe, *inputs))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_never_waits(sampler: str) -> None:
    start = torch.empty(2, 3, 8, 8, device="meta")
    found = sample(denoiser("meta"), start, sampler, 3, generator=torch.Generator().manual_seed(0))
    assert found.device.type == "meta"


def test_what_an_iteration_needs_stays_on_the_device() -> None:
    """Copies to a GPU wait for it: a second call makes none."""
    process, t = VP.linear(), torch.zeros(1, dtype=torch.int64, device="meta")
    process.a(t)
    assert process._tables(t.device)[0] is process._tables(t.device)[0]


def test_work_on_a_cpu_cannot_be_captured() -> None:
    with pytest.raises(ValueError, match="only work on a CUDA device"):
        capture_graph(lambda: None, [torch.zeros(3)])


def test_a_reversion_is_the_same_on_every_device(device: str) -> None:
    assert_alike(descend_reversed_loss(denoiser(device), BRIEF, seed=3), descend_reversed_loss(denoiser("cpu"), BRIEF, seed=3))


@pytest.mark.parametrize("record", [OnTheHost(), fails], ids=["verified_graph", "cannot be recorded"])
def test_a_reversion_on_kept_memory_is_the_same(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = descend_reversed_loss(denoiser("cpu"), BRIEF, seed=3)
    monkeypatch.setattr(terd, "verified_graph", partial(verified_graph, record=record))
    with pytest.warns(UserWarning, match="one by one") if record is fails else nullcontext():
        found = descend_reversed_loss(denoiser("cpu"), BRIEF, seed=3, capture=True)
    assert found.trigger.mu.equal(plain.trigger.mu)
    assert found.trigger.gamma.equal(plain.trigger.gamma)
    assert found.loss == plain.loss
    if isinstance(record, OnTheHost):
        # one for each stage
        assert record.count == 2


@pytest.mark.usefixtures("gpu")
def test_a_captured_reversion_is_the_same() -> None:
    steps: list[tuple[str, int]] = []
    eager = descend_reversed_loss(denoiser("cuda"), BRIEF, seed=3)
    graph = descend_reversed_loss(
        denoiser("cuda"), BRIEF, seed=3, capture=True, on_step=lambda stage, n, total, loss: steps.append((stage, n))
    )
    assert_alike(graph, eager)
    stages = (("estimation", BRIEF.estimation_iterations), ("refinement", BRIEF.refinement_iterations))
    assert steps == [(stage, n) for stage, total in stages for n in range(1, total + 1)]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("capture", [False, True])
def test_reversions_on_streams_of_their_own_do_not_mix(capture: bool) -> None:
    def revert(seed: int) -> Reversion:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = descend_reversed_loss(denoiser_of[seed], BRIEF, seed=seed, capture=capture)
            torch.cuda.current_stream().synchronize()
            return found

    denoiser_of = [denoiser("cuda") for _ in range(4)]
    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(revert, range(4)))
    for seed, found in enumerate(together):
        assert_alike(found, descend_reversed_loss(denoiser_of[seed], BRIEF, seed=seed))


@pytest.mark.usefixtures("gpu")
def test_the_default_search_finds_the_same_as_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = reverse_trigger(denoiser("cuda"), REPEATED, seed=3)
    monkeypatch.setattr(graph_cache, "WORTH_RECORDING", 10**6)
    assert_alike(graphs, reverse_trigger(denoiser("cuda"), REPEATED, seed=3))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("half", [False, True])
def test_every_iteration_of_the_default_search_is_recorded(half: bool) -> None:
    probe = Probe(denoiser("cuda"), torch.Generator().manual_seed(0), half_precision=half)
    settings = replace(REPEATED, half_precision=half)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*one by one")
        fixed_points.fixed_points(probe, settings)
        joint_inversion.fit_poisoned_rows(probe, settings)
        target_refinement.climb(probe, *torch.rand(2, 3, 8, 8, device="cuda"), settings, lambda loss: None)
    assert probe.replayed is not None
    names = {key[0] for key in probe.replayed.recordings}
    assert {joint_inversion._Descent(settings.fit_rate), target_refinement._Climb(settings.climb_rate)} <= names


@pytest.mark.usefixtures("gpu")
def test_half_precision_stays_near_full_precision() -> None:
    full, half = (
        descend_reversed_loss(denoiser("cuda"), replace(BRIEF, half_precision=precision), seed=3) for precision in (False, True)
    )
    assert half.finite
    assert half.loss == pytest.approx(full.loss, rel=0.05)


@pytest.mark.usefixtures("gpu")
def test_the_default_reversion_and_unlearning_run() -> None:
    model = denoiser("cuda")
    found = reverse_trigger(model, BRIEF_SEARCH, seed=0)
    assert found.trigger.mu.is_cuda
    assert found.clean_dispersion is not None
    assert math.isfinite(found.clean_dispersion)
    unlearned = unlearn_denoiser(model, [found.trigger], NoiseUnlearnSettings(steps=2, batch=2, images=2, image_steps=2))
    assert math.isfinite(unlearned.clean_loss + unlearned.triggered_loss)
    assert unlearned.denoiser.device.type == "cuda"
