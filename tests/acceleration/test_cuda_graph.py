"""Reversions on a GPU: as on the CPU, as CUDA graphs, and beside others; and what a recording needs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seal_fast.acceleration.cuda_graph import Record, capture_graph
from seal_fast.diffusion import EDM, SAMPLERS, VE, VP, Denoiser, NoiseProcess, sample
from seal_fast.noise_triggers import Reversion, SearchSettings, TerdSettings, reverse_trigger
from seal_fast.noise_triggers.attack_loss import AdamIteration, implied_pairs
from seal_fast.noise_triggers.fixed_points import FixedPointIteration, fixed_points, missed_noise, power_iteration
from seal_fast.noise_triggers.joint_inversion import JointInversion, joint_objective
from seal_fast.noise_triggers.probe import Iteration, Probe
from seal_fast.noise_triggers.reversion import search_reversion
from seal_fast.noise_triggers.search_settings import (
    ActivationTestSettings,
    FixedPointSettings,
    JointInversionSettings,
    TargetRefinementSettings,
)
from seal_fast.noise_triggers.target_refinement import mu_objective, refined_mu
from seal_fast.noise_triggers.terd import READ_EVERY, ReversedLossDescent, SgdIteration, TerdResult, descend_reversed_loss
from seal_fast.noise_triggers.unlearning import NoiseUnlearnSettings, unlearn_denoiser
from tests.acceleration.recording import OnTheHost, fails

BRIEF = TerdSettings(
    estimation_iterations=READ_EVERY + 3, refinement_iterations=2, batch=2, sampler_steps=2, half_precision=False
)
REPEATED = SearchSettings(
    fixed_points=FixedPointSettings(power_iterations=6, fixed_point_iterations=6, candidates=1),
    refinement=TargetRefinementSettings(turns=1, iterations=6),
    inversion=JointInversionSettings(halving=((6, 1),), alternations=1),
    test=ActivationTestSettings(ancestral_steps=2, deterministic_steps=2),
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


def assert_agree(got: Reversion | TerdResult, want: Reversion | TerdResult) -> None:
    assert got.finite == want.finite
    assert got.evaluations == want.evaluations
    assert got.loss == pytest.approx(want.loss, rel=1e-2, nan_ok=True)
    for one, other in ((got.trigger.mu, want.trigger.mu), (got.trigger.gamma, want.trigger.gamma)):
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("process", PROCESSES)
def test_an_iteration_can_be_recorded(process: str) -> None:
    """Tensors without data stand in for those of a GPU: to wait for their values, or to mix them with the CPU's, fails."""
    descent = ReversedLossDescent(denoiser("meta", PROCESSES[process]), BRIEF, 0)
    for stage in descent.stages:
        draws = [drawn.to("meta") for drawn in stage.draw()]
        (gradient,) = torch.autograd.grad(stage.loss_of(draws), descent.mu)
        assert gradient.device.type == "meta"
    iteration = SgdIteration(descent, stage, draws)
    assert all(x.device.type == "meta" for x in (*iteration.state, *iteration.draws, iteration.rate))


@pytest.mark.parametrize("process", PROCESSES)
def test_an_iteration_of_the_default_search_can_be_recorded(process: str) -> None:
    """Likewise; of a descent its gradients, since the form of Adam's step for GPUs takes no other tensors."""
    probe = Probe(denoiser("meta", PROCESSES[process]), 0, half_precision=False)
    t, eps, images = (
        torch.empty(6, dtype=torch.int64, device="meta"),
        *(torch.empty(n, 3, 8, 8, device="meta") for n in (2, 3)),
    )
    uniform, number, coefficients = (torch.empty(shape, device="meta") for shape in ((3, 3, 1, 1), (), (4, 2)))
    samples = t, eps, coefficients
    iterations: list[tuple[Iteration, tuple[Tensor, ...]]] = [
        (power_iteration, (t, eps, uniform, uniform, images)),
        (FixedPointIteration(REPEATED.fixed_points), (t, eps, number, images, images)),
        (missed_noise, (t, eps, uniform, images, images)),
        (implied_pairs, (*samples, images, images)),
    ]
    for iteration, inputs in iterations:
        assert all(x.device.type == "meta" for x in iteration(probe, *inputs))
    for objective, variables in ((joint_objective, 2), (mu_objective, 1)):
        loss, gradients = AdamIteration(objective, variables, 0.1, 0.1).gradients(probe, *samples, images, images)
        assert len(gradients) == variables
        assert all(x.device.type == "meta" for x in (loss, *gradients))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_never_waits(sampler: str) -> None:
    start = torch.empty(2, 3, 8, 8, device="meta")
    found = sample(denoiser("meta"), start, sampler, 3, generator=torch.Generator().manual_seed(0))
    assert found.device.type == "meta"


class Copies(TorchDispatchMode):
    """Counts copies between devices or types."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def test_tables_of_a_process_stay_on_the_device() -> None:
    """Copies to a GPU wait for it: a second call makes none."""
    process, t = VP.linear(), torch.zeros(1, dtype=torch.int64, device="meta")
    for expected in (2, 0):
        with Copies() as copies:
            process.a(t)
            process.b(t)
        assert copies.count == expected


def test_work_on_a_cpu_cannot_be_a_cuda_graph() -> None:
    with pytest.raises(ValueError, match="only work on a CUDA device"):
        capture_graph(lambda: None, [torch.zeros(3)])


def test_a_reversion_is_the_same_on_every_device(device: str) -> None:
    assert_agree(descend_reversed_loss(denoiser(device), BRIEF, seed=3), descend_reversed_loss(denoiser("cpu"), BRIEF, seed=3))


@pytest.mark.parametrize("record", [OnTheHost(), fails], ids=["recorded", "cannot be recorded"])
def test_a_recorded_reversion_is_the_same(record: Record) -> None:
    plain = descend_reversed_loss(denoiser("cpu"), BRIEF, seed=3)
    with pytest.warns(UserWarning, match="one by one") if record is fails else nullcontext():
        found = descend_reversed_loss(denoiser("cpu"), BRIEF, seed=3, record=record)
    assert found.trigger.mu.equal(plain.trigger.mu)
    assert found.trigger.gamma.equal(plain.trigger.gamma)
    assert found.loss == plain.loss
    if isinstance(record, OnTheHost):
        # one for each stage
        assert record.count == 2


@pytest.mark.usefixtures("gpu")
def test_a_reversion_as_cuda_graphs_is_the_same() -> None:
    steps: list[tuple[str, int]] = []
    eager = descend_reversed_loss(denoiser("cuda"), BRIEF, seed=3)
    graph = descend_reversed_loss(
        denoiser("cuda"), BRIEF, seed=3, record=capture_graph, on_step=lambda stage, n, *_: steps.append((stage, n))
    )
    assert_agree(graph, eager)
    stages = (("estimation", BRIEF.estimation_iterations), ("refinement", BRIEF.refinement_iterations))
    assert steps == [(stage, n) for stage, total in stages for n in range(1, total + 1)]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("record", [None, capture_graph], ids=["eager", "graphs"])
def test_reversions_on_streams_of_their_own_do_not_mix(record: Record | None) -> None:
    def revert(seed: int) -> TerdResult:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = descend_reversed_loss(denoiser_of[seed], BRIEF, seed=seed, record=record)
            torch.cuda.current_stream().synchronize()
            return found

    denoiser_of = [denoiser("cuda") for _ in range(4)]
    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(revert, range(4)))
    for seed, found in enumerate(together):
        assert_agree(found, descend_reversed_loss(denoiser_of[seed], BRIEF, seed=seed))


@pytest.mark.usefixtures("gpu")
def test_the_default_search_finds_the_same_as_graphs() -> None:
    graphs = reverse_trigger(denoiser("cuda"), REPEATED, seed=3)
    with pytest.warns(UserWarning, match="one by one"):
        eager = search_reversion(Probe(denoiser("cuda"), 3, half_precision=False, record=fails), REPEATED)
    assert_agree(graphs, eager)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("half", [False, True])
def test_every_iteration_of_the_default_search_is_recorded(half: bool) -> None:
    probe = Probe(denoiser("cuda"), 0, half_precision=half)
    settings = replace(REPEATED, half_precision=half)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*one by one")
        fixed_points(probe, settings)
        JointInversion(probe, settings).pairs()
        refined_mu(probe, *torch.rand(2, 3, 8, 8, device="cuda"), settings, lambda loss: None)
    assert probe.graphs is not None
    weight = settings.attack_loss.range_weight
    descents = {
        AdamIteration(joint_objective, 2, settings.inversion.learning_rate, weight),
        AdamIteration(mu_objective, 1, settings.refinement.learning_rate, weight),
    }
    assert descents <= {key[0] for key in probe.graphs.recordings}


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
    found = reverse_trigger(model, replace(REPEATED, half_precision=True), seed=0)
    assert found.trigger.mu.is_cuda
    assert found.clean_dispersion is not None
    assert math.isfinite(found.clean_dispersion)
    unlearned = unlearn_denoiser(model, [found.trigger], NoiseUnlearnSettings(steps=2, batch=2, images=2, image_steps=2))
    assert math.isfinite(unlearned.clean_loss + unlearned.triggered_loss)
    assert unlearned.denoiser.device.type == "cuda"
