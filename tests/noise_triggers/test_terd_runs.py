"""Runs of TERD's reversion: what they draw, count and report, and how they end."""

from __future__ import annotations

import math
from dataclasses import astuple, replace
from typing import Any

import pytest
import torch

from seal_fast.diffusion import VP, Denoiser, NoiseSource
from seal_fast.noise_triggers import PRESETS, TerdSettings, model_evidence, reverse_trigger
from seal_fast.noise_triggers.terd import initial_mu
from seal_fast.training import native_bfloat16
from tests.noise_triggers.recorded_networks import (
    QUIET,
    SHAPE,
    STEPS,
    Function,
    Nonlinear,
    Recorder,
    constant,
    fresh_seed,
    revert,
)


@pytest.mark.parametrize(("window", "width"), [(0.1, 4), (0.01, 1), (0.5, 20)])
def test_timesteps_fill_both_windows_and_nothing_else(generator: torch.Generator, window: float, width: int) -> None:
    recorder = Recorder(constant())
    settings = replace(QUIET, estimation_iterations=0, refinement_iterations=60, batch=4, sampler_steps=1, window=window)
    revert(recorder, settings, seed=fresh_seed(generator))
    t = torch.stack([at for _, at in recorder.calls[1::2]])
    assert t[:, :4].equal(t[:, 4:8])
    assert t[:, 8:12].equal(t[:, 12:])
    assert t[:, :8].unique().tolist() == list(range(STEPS - width, STEPS))
    assert t[:, 8:].unique().tolist() == list(range(width))


def test_a_seed_fixes_the_result_and_another_changes_it(generator: torch.Generator) -> None:
    network, seed = Nonlinear(generator), fresh_seed(generator)
    settings = replace(QUIET, estimation_iterations=3, refinement_iterations=2, gamma_learning_rate=0.01, l1=1e-3)
    once, again, other = (revert(network, settings, seed=s) for s in (seed, seed, seed + 1))
    assert once.trigger.mu.equal(again.trigger.mu)
    assert once.trigger.gamma.equal(again.trigger.gamma)
    assert (once.loss, once.evaluations) == (again.loss, again.evaluations)
    assert not once.trigger.mu.equal(other.trigger.mu)
    assert not once.trigger.mu.requires_grad
    assert not once.trigger.gamma.requires_grad


def test_global_random_state_is_neither_read_nor_moved(generator: torch.Generator) -> None:
    network, settings = Nonlinear(generator), replace(QUIET, refinement_iterations=1)
    torch.manual_seed(fresh_seed(generator))
    before = torch.get_rng_state()
    once = revert(network, settings)
    assert torch.get_rng_state().equal(before)
    torch.rand(1)
    assert revert(network, settings).trigger.mu.equal(once.trigger.mu)


def test_the_network_is_left_as_it_was(generator: torch.Generator) -> None:
    network = Nonlinear(generator)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    revert(network, replace(QUIET, estimation_iterations=2, refinement_iterations=2))
    for name, parameter in network.named_parameters():
        assert parameter.equal(before[name])
        assert parameter.grad is None
        assert not parameter.requires_grad


def cost(settings: TerdSettings) -> int:
    """Images through the network: pairs, in stage 2 of two windows and from a sampler."""
    first, second = settings.estimation_iterations, settings.refinement_iterations
    return settings.batch * (first * 2 + second * (settings.sampler_steps + 4))


@pytest.mark.parametrize(("first", "second", "batch", "steps"), [(3, 2, 5, 4), (0, 3, 1, 7), (4, 0, 2, 10), (0, 0, 2, 3)])
def test_every_image_through_the_network_is_counted(first: int, second: int, batch: int, steps: int) -> None:
    recorder = Recorder(constant())
    settings = TerdSettings(first, second, batch, sampler_steps=steps)
    assert revert(recorder, settings).evaluations == recorder.images == cost(settings)
    assert sum(stage.iterations * stage.images for stage in settings.stages) == cost(settings)


def test_progress_reports_every_step_and_the_loss_is_that_of_the_last_tenth(generator: torch.Generator) -> None:
    seen: list[tuple[str, int, int, float]] = []
    settings = replace(QUIET, estimation_iterations=4, refinement_iterations=30, sampler_steps=1)
    denoiser = Denoiser(Nonlinear(generator), VP.linear(STEPS), SHAPE)
    found = reverse_trigger(denoiser, settings, seed=fresh_seed(generator), on_step=lambda *step: seen.append(step))
    expected = [(stage.name, i, stage.iterations) for stage in settings.stages for i in range(1, stage.iterations + 1)]
    assert [step[:3] for step in seen] == expected
    tail = [step[3] for step in seen[-3:]]
    assert found.loss == pytest.approx(sum(tail) / 3, rel=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("calls", [0, 2, 5])
def test_divergence_is_reported_and_ends_the_run(value: float, calls: int) -> None:
    recorder = Recorder(Function(lambda x, t: x * (value if len(recorder.calls) > calls else 0.5)))
    # two estimation calls, then a refinement step of three sampling calls and one of the loss
    found = revert(recorder, replace(QUIET, estimation_iterations=2, refinement_iterations=4, sampler_steps=3))
    assert not found.finite
    assert set(astuple(model_evidence(found))) == {None}
    assert found.evaluations == recorder.images
    assert len(recorder.calls) == (1 if calls == 0 else 2 + 4)


def test_an_overflow_of_the_trigger_in_the_very_last_step_is_reported(generator: torch.Generator) -> None:
    settings = replace(QUIET, learning_rate=1e38, l1=1e38)
    found = revert(Nonlinear(generator), settings)
    assert math.isfinite(found.loss)
    assert not found.trigger.mu.isfinite().all()
    assert not found.finite
    assert set(astuple(model_evidence(found))) == {None}


def test_no_iterations_return_the_start(generator: torch.Generator) -> None:
    seed = fresh_seed(generator)
    found = revert(constant(), replace(QUIET, estimation_iterations=0), seed=seed)
    assert found.finite
    assert math.isnan(found.loss)
    evidence = model_evidence(found)
    assert evidence.reversed_loss is None
    assert evidence.mu_norm == pytest.approx(float(found.trigger.mu.norm()), rel=1e-5)


def test_the_start_is_minus_uniform(generator: torch.Generator) -> None:
    mu = initial_mu(NoiseSource(torch.device("cpu"), fresh_seed(generator)), (3, 64, 64))
    assert -1 < float(mu.min()) < -0.99
    assert -0.01 < float(mu.max()) <= 0
    assert float(mu.mean()) == pytest.approx(-0.5, abs=5 / math.sqrt(12 * mu.numel()))
    trigger = revert(constant(), replace(QUIET, estimation_iterations=0, gamma_start=0.3)).trigger
    assert trigger.gamma.equal(torch.full(SHAPE, 0.3))
    assert bool((trigger.mu <= 0).all())


def test_half_precision_is_asked_for_where_the_hardware_has_it(generator: torch.Generator) -> None:
    network = Nonlinear(generator)
    asked, plain = Recorder(network), Recorder(network)
    settings = replace(QUIET, estimation_iterations=3, refinement_iterations=1, learning_rate=0.05)
    half = revert(asked, replace(settings, half_precision=True))
    full = revert(plain, settings)
    assert plain.autocast == {False}
    assert asked.autocast == {native_bfloat16(torch.device("cpu"))}
    assert half.trigger.mu.dtype == torch.float32
    torch.testing.assert_close(half.loss, full.loss, rtol=0.05, atol=0)
    torch.testing.assert_close(half.trigger.mu, full.trigger.mu, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "change",
    [
        {"estimation_iterations": -1},
        {"refinement_iterations": -1},
        {"batch": 0},
        {"sampler_steps": 0},
        {"window": 0.0},
        {"window": -0.1},
        {"window": 0.51},
        {"window": math.nan},
        {"gamma_start": 0.0},
        {"learning_rate": -0.1},
        {"refinement_momentum": 1.0},
        {"refinement_clip": -1.0},
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change)).split("_")[-1]):
        replace(TerdSettings(), **change)


def test_the_published_preset_holds_the_published_values() -> None:
    published = PRESETS["published"]
    assert isinstance(published, TerdSettings)
    assert (published.estimation_iterations, published.refinement_iterations) == (3000, 1000)
    assert (published.batch, published.sampler_steps, published.window) == (16, 10, 0.01)
    assert (published.learning_rate, published.gamma_learning_rate, published.l1) == (0.5, 0.001, 5e-5)
    assert (published.refinement_momentum, published.refinement_clip) == (0.9, 1.0)
