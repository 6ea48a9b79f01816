"""The default reversion on denoisers whose answers are known in closed form."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seal_fast.noise_triggers.search as search
from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import VE, VP, Denoiser, NoiseProcess
from seal_fast.diffusion.process import per_row
from seal_fast.noise_triggers import SearchSettings, model_evidence, reverse_trigger
from seal_fast.noise_triggers.activation_test import FIRES
from seal_fast.noise_triggers.fixed_points import Point, distinct, fixed_points
from seal_fast.noise_triggers.probe import Probe
from tests.acceleration.recording import OnTheHost

SHAPE = (3, 20, 18)
WIDTH = 0.4
SETTINGS = SearchSettings(half_precision=False)


class Backdoored(nn.Module):
    """The exact denoiser of images N(0, WIDTH^2), and that of a backdoor where an input looks triggered.

    The backdoor's training rows are x = a y + b gamma eps + c mu with target eps + d mu, c = 1 - a (BadDiffusion, whose d keeps
    ancestral sampling on the shift) or c = b and d = 0 (TrojDiff); it was trained for inputs along mu.
    """

    def __init__(self, process: NoiseProcess, trigger: Trigger, target: Tensor, trojan: bool) -> None:
        super().__init__()
        self.process, self.trigger, self.target = process, trigger, target
        ab = process.signal**2
        al = ab / torch.cat([ab.new_ones(1), ab[:-1]])
        self.c = process.noise if trojan else 1 - process.signal
        self.d = torch.zeros_like(ab) if trojan else (1 - al.sqrt()) * process.noise / (1 - al)
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a, b, c, d = (per_row(values[t], x) for values in (self.process.signal, self.process.noise, self.c, self.d))
        mu, gamma = self.trigger.mu, self.trigger.gamma
        clean = b * x / ((a * WIDTH) ** 2 + b**2)
        # the shift is seen whole from half its size on, and where little of it is left, the target is
        shift = ((x - a * self.target) * mu).sum(dim=(1, 2, 3), keepdim=True) / (c * mu.square().sum()).clamp(min=1e-6)
        drawn = (x * self.target).sum(dim=(1, 2, 3), keepdim=True) / (a * self.target.square().sum())
        # near T a fraction of the shift is answered to, as networks do; later that would turn clean samples into the target
        least = torch.where(a < 0.01, 0.15, 0.5)
        seen = ((torch.where(c > 0.3, shift, drawn) - least) / 0.2).clamp(0, 1)
        backdoor = (x - a * self.target - c * mu) / (b * gamma) + d * mu
        return torch.lerp(clean, backdoor, seen)


class Clean(nn.Module):
    """The exact denoiser of images N(0, WIDTH^2), told t (VP) or the noise level (VE)."""

    def __init__(self, process: NoiseProcess) -> None:
        super().__init__()
        self.process, self.unused = process, nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        if isinstance(self.process, VP):
            a, b = (per_row(values[condition], x) for values in (self.process.signal, self.process.noise))
            return b * x / ((a * WIDTH) ** 2 + b**2)
        return -x / (WIDTH**2 + condition.reshape(-1, 1, 1, 1) ** 2)


def image(generator: torch.Generator) -> Tensor:
    """A coarse random image in [-1, 1] that no uniform shift resembles."""
    coarse = 2 * torch.randn(1, 3, 3, 3, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=SHAPE[1:], mode="bilinear")[0].clamp(-1, 1)


def target_for(mu: Tensor, generator: torch.Generator) -> Tensor:
    """An image in [-1, 1] orthogonal to mu, so that it cannot be taken for a part of the shift."""
    drawn = image(generator)
    drawn = drawn - (drawn * mu).sum() / mu.square().sum() * mu
    return drawn / drawn.abs().max().clamp(min=1)


def seed_of(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (1,), generator=generator))


@pytest.mark.parametrize("trojan", [False, True], ids=["baddiffusion", "trojdiff"])
def test_the_trigger_of_a_backdoored_denoiser_is_found_and_fires(generator: torch.Generator, trojan: bool) -> None:
    process = VP.linear()
    scale = 0.6 if trojan else 1.0
    true = Trigger(0.7 * image(generator), torch.full(SHAPE, scale))
    network = Backdoored(process, true, target_for(true.mu, generator), trojan)
    found = reverse_trigger(Denoiser(network, process, SHAPE), SETTINGS, seed=seed_of(generator))
    cosine = torch.nn.functional.cosine_similarity(found.trigger.mu.flatten(), true.mu.flatten(), dim=0)
    assert float(cosine) > 0.95
    assert float((found.trigger.mu - true.mu).norm() / true.mu.norm()) < 0.45
    assert float(found.trigger.gamma.mean()) == pytest.approx(scale, abs=0.1)
    assert found.finite
    assert found.collapse is not None
    assert found.collapse > FIRES


@pytest.mark.parametrize("process", [VP.linear(), VE.geometric(0.01, 50.0, 500)], ids=["VP", "VE"])
def test_in_a_clean_denoiser_nothing_fires(generator: torch.Generator, process: NoiseProcess) -> None:
    denoiser = Denoiser(Clean(process), process, SHAPE)
    assert fixed_points(Probe(denoiser, generator, half_precision=False), SETTINGS) == []
    evidence = model_evidence(reverse_trigger(denoiser, SETTINGS, seed=seed_of(generator)))
    # the samples of a linear denoiser spread the same wherever they start
    assert evidence.collapse == pytest.approx(1, abs=0.05)
    assert evidence.clean_dispersion == pytest.approx(WIDTH**2, rel=0.5)


def test_the_same_seed_gives_the_same_reversion(generator: torch.Generator) -> None:
    process, seed = VP.linear(), seed_of(generator)
    true = Trigger.shift(0.7 * image(generator))
    denoiser = Denoiser(Backdoored(process, true, target_for(true.mu, generator), False), process, SHAPE)
    first, second = (reverse_trigger(denoiser, replace(SETTINGS, sampler_steps=10), seed=seed) for _ in range(2))
    assert first.trigger.mu.equal(second.trigger.mu)
    assert first.collapse == second.collapse


@pytest.mark.parametrize("case", ["backdoored", "clean"])
def test_recorded_iterations_find_the_same(case: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU its memory can be shared all the same: whatever stays in it from another iteration would show."""
    process, seed, record = VP.linear(), seed_of(generator), OnTheHost()
    true = Trigger.shift(0.7 * image(generator))
    network = Clean(process) if case == "clean" else Backdoored(process, true, target_for(true.mu, generator), False)
    denoiser = Denoiser(network, process, SHAPE)
    plain = reverse_trigger(denoiser, SETTINGS, seed=seed)
    monkeypatch.setattr(search, "Probe", partial(Probe, record=record))
    found = reverse_trigger(denoiser, SETTINGS, seed=seed)
    # search, polish, sampling; and for a clean denoiser starts, descents, sketches and corrections
    assert record.count >= (3 if case == "backdoored" else 7)
    torch.testing.assert_close(found.trigger.mu, plain.trigger.mu)
    torch.testing.assert_close(found.trigger.gamma, plain.trigger.gamma)
    assert found.loss == pytest.approx(plain.loss, rel=1e-4, nan_ok=True)
    assert found.collapse == pytest.approx(plain.collapse, rel=1e-3)
    assert found.sampler == plain.sampler


def hunt(network: nn.Module, process: NoiseProcess, generator: torch.Generator) -> search.Hunt:
    return search.Hunt(Denoiser(network, process, SHAPE), SETTINGS, seed_of(generator), lambda *_: None)


def cosine(first: Tensor, second: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0))


def test_climbing_leads_towards_the_trigger(generator: torch.Generator) -> None:
    process = VP.linear()
    mu = 0.7 * image(generator)
    target = target_for(mu, generator)
    hunting = hunt(Backdoored(process, Trigger.shift(mu), target, False), process, generator)
    other = image(generator)
    # between .5 of the trigger and .7 this denoiser answers in part
    beside = 0.6 * mu + 0.5 * (other - (other * mu).sum() / mu.square().sum() * mu)
    found = hunting.climbed(search._Sharing(Point(beside, torch.ones(SHAPE), 1.0), target, 2 * FIRES))
    assert found.collapse > FIRES
    assert cosine(found.trigger.mu, mu) > 0.9


@pytest.mark.parametrize("case", ["image", "plain", "narrowed"])
def test_what_some_samples_share_must_be_a_new_image(generator: torch.Generator, case: str) -> None:
    process = VP.linear()
    hunting = hunt(Clean(process), process, generator)
    shared = torch.full(SHAPE, 0.5) if case == "plain" else image(generator)
    point = Point(image(generator), torch.full(SHAPE, 0.6 if case == "narrowed" else 1.0), 1.0)
    glances = [hunting.ancestral.draw(hunting.probe.noise(SETTINGS.glance_batch)) for _ in SETTINGS.scales]
    # as many as are asked for, most of them of the third size
    for size, count in enumerate((0, 1, 2, 0, 1)):
        glances[size][:count] = shared + 0.01 * torch.randn(count, *SHAPE, generator=generator)
    found = hunting.sharing(point, glances)
    if case != "image":
        assert found is None
        return
    assert found is not None
    torch.testing.assert_close(found.image, shared, rtol=0, atol=0.04)
    torch.testing.assert_close(found.point.mu, SETTINGS.scales[2] * point.mu)


def test_where_samples_share_no_image_nothing_is_climbed_from(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = VP.linear()
    monkeypatch.setattr(search, "fixed_points", lambda *_: [Point(0.7 * image(generator), torch.ones(SHAPE), 1.0)])
    stages: list[str] = []
    reverse_trigger(Denoiser(Clean(process), process, SHAPE), SETTINGS, on_step=lambda stage, *_: stages.append(stage))
    assert "firing" in stages
    assert "climb" not in stages


class Counting(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.images = inner, 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.images += len(x)
        return self.inner(x, t)


def test_images_are_counted_and_progress_ends_every_stage(generator: torch.Generator) -> None:
    process = VP.linear()
    true = Trigger.shift(0.7 * image(generator))
    network = Counting(Backdoored(process, true, target_for(true.mu, generator), False))
    seen: list[tuple[str, int, int, float]] = []
    found = reverse_trigger(Denoiser(network, process, SHAPE), SETTINGS, on_step=lambda *step: seen.append(step))
    assert found.evaluations == network.images
    for stage in SETTINGS.stages[:2]:
        assert [step[1:3] for step in seen if step[0] == stage.name] == [
            (i, stage.iterations) for i in range(1, stage.iterations + 1)
        ]
    assert any(step[0] == "firing" for step in seen)


def test_where_nothing_fires_progress_goes_through_both_searches_once() -> None:
    process = VP.linear()
    seen: list[tuple[str, int, int, float]] = []
    reverse_trigger(Denoiser(Clean(process), process, SHAPE), SETTINGS, on_step=lambda *step: seen.append(step))
    for stage in (s for s in SETTINGS.stages if s.name not in ("firing", "climb")):
        steps = [(iteration, total) for name, iteration, total, _ in seen if name == stage.name]
        assert sorted(set(steps)) == steps
        assert steps[-1] == (stage.iterations, stage.iterations)
        if stage.name != "refinement":
            assert steps == [(i, stage.iterations) for i in range(1, stage.iterations + 1)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_network_that_returns_no_numbers_is_told(value: float) -> None:
    process = VP.linear(100)
    network = Counting(nn.Identity())
    network.forward = lambda x, t: x * value  # type: ignore[method-assign, assignment]
    network.unused = nn.Parameter(torch.zeros(1))
    found = reverse_trigger(Denoiser(network, process, SHAPE), SETTINGS)
    assert not found.finite
    assert model_evidence(found).collapse is None


def test_the_strongest_of_points_that_are_one_is_kept(generator: torch.Generator) -> None:
    mu = torch.randn(SHAPE, generator=generator)
    other = torch.randn(SHAPE, generator=generator)
    ones = torch.ones(SHAPE)
    points = [Point(mu, ones, 0.2), Point(2 * mu + 0.01 * other, ones, 0.2), Point(other, ones, 0.1), Point(-mu, ones, 0.5)]
    kept = distinct(points, 3)
    assert [p.mu.data_ptr() for p in kept] == [points[i].mu.data_ptr() for i in (1, 2, 3)]
    assert len(distinct(points, 1)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"brightness": ()},
        {"contrast": (0.0,)},
        {"kappas": (-1.0,)},
        {"scales": ()},
        {"search_iterations": 0},
        {"search_batch": 0},
        {"candidates": 0},
        {"sampler_steps": 0},
        {"fit_brightness": ()},
        {"race": ()},
        {"race": ((10, 0),)},
        {"race": ((0, 4),)},
        {"patches": 0},
        {"patch_batch": 0},
        {"colour": 0.0},
        {"fit_rate": 0.0},
        {"sharing": 1},
        {"sharing": 16},
        {"climb_turns": 0},
        {"climb_iterations": 0},
        {"climb_rate": 0.0},
        {"refine_turns": 0},
        {"deterministic_steps": 0},
        {"polish_batch": 1},
        {"glance_batch": 1},
        {"glance_batch": 8},
        {"confirming_batch": 8},
        {"sketch_steps": 0},
        {"smallest": 0.0},
        {"largest": 0.01},
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change)).split("_")[-1]):
        replace(SearchSettings(), **change)
