"""The default search on denoisers whose responses are known in closed form."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor, nn

from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import VE, VP, Denoiser, NoiseProcess
from seal_fast.diffusion.process import per_sample
from seal_fast.noise_triggers import SearchSettings, model_evidence, reverse_trigger
from seal_fast.noise_triggers.activation_test import ActivationTest
from seal_fast.noise_triggers.candidates import Candidate, Consensus, Origin, Outcome, TestResult, best_of
from seal_fast.noise_triggers.fixed_points import distinct, fixed_points, propose_fixed_points
from seal_fast.noise_triggers.probe import Probe
from seal_fast.noise_triggers.reversion import search_reversion
from seal_fast.noise_triggers.search import Proposer, search_trigger
from seal_fast.noise_triggers.target_refinement import refine_with_target
from tests.acceleration.recording import OnTheHost

SHAPE = (3, 20, 18)
WIDTH = 0.4
SETTINGS = SearchSettings(half_precision=False)
ACTIVATES = SETTINGS.test.activates_above


class Backdoored(nn.Module):
    """The exact denoiser of images N(0, WIDTH^2), and that of a backdoor where an input looks triggered.

    The poisoned samples are x = a y + b gamma eps + c mu with target eps + d mu, c = 1 - a (BadDiffusion, whose d keeps
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
        a, b, c, d = (per_sample(values[t], x) for values in (self.process.signal, self.process.noise, self.c, self.d))
        mu, gamma = self.trigger.mu, self.trigger.gamma
        clean = b * x / ((a * WIDTH) ** 2 + b**2)
        # the shift is seen whole from half its size on, and where little of it is left, the target is
        shift = ((x - a * self.target) * mu).sum(dim=(1, 2, 3), keepdim=True) / (c * mu.square().sum()).clamp(min=1e-6)
        drawn = (x * self.target).sum(dim=(1, 2, 3), keepdim=True) / (a * self.target.square().sum())
        # near T it responds to a fraction of the shift, as networks do; later that would turn clean samples into the target
        least = torch.where(a < 0.01, 0.15, 0.5)
        seen = ((torch.where(c > 0.3, shift, drawn) - least) / 0.2).clamp(0, 1)
        backdoor = (x - a * self.target - c * mu) / (b * gamma) + d * mu
        return torch.lerp(clean, backdoor, seen)


class Clean(nn.Module):
    """The exact denoiser of images N(0, WIDTH^2), conditioned on t (VP) or on the noise level (VE)."""

    def __init__(self, process: NoiseProcess) -> None:
        super().__init__()
        self.process, self.unused = process, nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        if isinstance(self.process, VP):
            a, b = (per_sample(values[condition], x) for values in (self.process.signal, self.process.noise))
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


def probe_of(denoiser: Denoiser, generator: torch.Generator) -> Probe:
    return Probe(denoiser, seed_of(generator), half_precision=False)


@pytest.mark.parametrize("trojan", [False, True], ids=["baddiffusion", "trojdiff"])
def test_the_trigger_of_a_backdoored_denoiser_is_found_and_activates_it(generator: torch.Generator, trojan: bool) -> None:
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
    assert found.collapse > ACTIVATES
    assert [one.outcome for one in found.candidates][-1] == "accepted"


@pytest.mark.parametrize("process", [VP.linear(), VE.geometric(0.01, 50.0, 500)], ids=["VP", "VE"])
def test_in_a_clean_denoiser_no_candidate_activates(generator: torch.Generator, process: NoiseProcess) -> None:
    denoiser = Denoiser(Clean(process), process, SHAPE)
    assert fixed_points(probe_of(denoiser, generator), SETTINGS) == []
    found = reverse_trigger(denoiser, SETTINGS, seed=seed_of(generator))
    evidence = model_evidence(found)
    # the samples of a linear denoiser vary the same wherever they start
    assert evidence.collapse == pytest.approx(1, abs=0.05)
    assert evidence.clean_dispersion == pytest.approx(WIDTH**2, rel=0.5)
    assert [one.origin for one in found.candidates] == ["no-trigger", "joint-inversion", "joint-inversion"]
    assert {one.outcome for one in found.candidates} == {"no-trigger", "rejected"}
    assert json.loads(json.dumps([asdict(one) for one in found.candidates]))[0]["score"] == 1.0


def test_the_same_seed_gives_the_same_reversion(generator: torch.Generator) -> None:
    process, seed = VP.linear(), seed_of(generator)
    true = Trigger.shift(0.7 * image(generator))
    denoiser = Denoiser(Backdoored(process, true, target_for(true.mu, generator), False), process, SHAPE)
    first, second = (
        reverse_trigger(denoiser, replace(SETTINGS, test=replace(SETTINGS.test, ancestral_steps=10)), seed=seed)
        for _ in range(2)
    )
    assert first.trigger.mu.equal(second.trigger.mu)
    assert first.collapse == second.collapse


@pytest.mark.parametrize("case", ["backdoored", "clean"])
def test_recorded_iterations_find_the_same(case: str, generator: torch.Generator) -> None:
    """Without a GPU its memory can be shared all the same: whatever stays in it from another iteration would show."""
    process, seed, record = VP.linear(), seed_of(generator), OnTheHost()
    true = Trigger.shift(0.7 * image(generator))
    network = Clean(process) if case == "clean" else Backdoored(process, true, target_for(true.mu, generator), False)
    denoiser = Denoiser(network, process, SHAPE)
    plain, found = (search_reversion(Probe(denoiser, seed, False, how), SETTINGS) for how in (None, record))
    # power and fixed-point iterations, and sampling; for a clean denoiser starts, descents, previews and corrections too
    assert record.count >= (3 if case == "backdoored" else 7)
    torch.testing.assert_close(found.trigger.mu, plain.trigger.mu)
    torch.testing.assert_close(found.trigger.gamma, plain.trigger.gamma)
    assert found.loss == pytest.approx(plain.loss, rel=1e-4, nan_ok=True)
    assert found.collapse == pytest.approx(plain.collapse, rel=1e-3)
    assert found.sampler == plain.sampler


def candidate_of(mu: Tensor, loss: float = 1.0, scales: tuple[float, ...] = SETTINGS.test.scales) -> Candidate:
    return Candidate(mu, torch.ones(SHAPE), loss, Origin.FIXED_POINT, "ddpm", SETTINGS.test.accept_above, scales)


def proposing(*candidates: Candidate) -> Proposer:
    """A proposer of these candidates."""

    def propose(probe: Probe, settings: SearchSettings, tried: Sequence[TestResult]) -> Iterator[Candidate]:
        yield from candidates

    return propose


def cosine(first: Tensor, second: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0))


def test_target_guided_refinement_leads_towards_the_trigger(generator: torch.Generator) -> None:
    process = VP.linear()
    mu = 0.7 * image(generator)
    target = target_for(mu, generator)
    probe = probe_of(Denoiser(Backdoored(process, Trigger.shift(mu), target, False), process, SHAPE), generator)
    other = image(generator)
    # between .5 of the trigger and .7 this denoiser responds in part
    beside = 0.6 * mu + 0.5 * (other - (other * mu).sum() / mu.square().sum() * mu)
    consensus = Consensus(target, 2 * ACTIVATES, 1.0)
    steps: list[tuple[str, int, int]] = []
    probe.on_step = lambda stage, iteration, total, loss: steps.append((stage, iteration, total))
    tried = [TestResult(candidate_of(beside), Outcome.REJECTED, consensus=consensus)]
    test = ActivationTest(probe, SETTINGS.test)
    for candidate in refine_with_target(probe, SETTINGS, tried):
        tried.append(test(candidate))
        if tried[-1].accepted:
            break
    (stage,) = (stage for stage in SETTINGS.stages if stage.name == "target-guided refinement")
    assert steps == [(stage.name, i, stage.iterations) for i in range(1, len(steps) + 1)]
    assert len(steps) >= SETTINGS.refinement.iterations
    best = best_of(tried)
    assert best.candidate.origin is Origin.TARGET_REFINEMENT
    assert best.score is not None
    assert best.score > ACTIVATES
    assert cosine(best.trigger.mu, mu) > 0.9


def test_without_a_consensus_nothing_is_refined(generator: torch.Generator) -> None:
    process = VP.linear()
    probe = probe_of(Denoiser(Clean(process), process, SHAPE), generator)
    result = search_trigger(probe, SETTINGS, (proposing(candidate_of(0.7 * image(generator))), refine_with_target))
    assert [one.candidate.origin for one in result.tried] == [Origin.FIXED_POINT]
    assert result.tried[0].consensus is None


def test_the_search_ends_with_the_first_accepted_candidate(generator: torch.Generator) -> None:
    process = VP.linear()
    mu = 0.7 * image(generator)
    denoiser = Denoiser(Backdoored(process, Trigger.shift(mu), target_for(mu, generator), False), process, SHAPE)
    nothing, trigger = candidate_of(-mu), candidate_of(mu)
    result = search_trigger(probe_of(denoiser, generator), SETTINGS, (proposing(nothing), proposing(trigger, nothing)))
    assert [one.candidate for one in result.tried] == [nothing, trigger]
    assert [one.accepted for one in result.tried] == [False, True]
    assert result.best is result.tried[-1]


def test_a_proposer_sees_the_result_of_its_last_candidate(generator: torch.Generator) -> None:
    process, first, second = VP.linear(), candidate_of(image(generator)), candidate_of(image(generator), scales=())
    seen: list[Candidate] = []

    def propose(probe: Probe, settings: SearchSettings, tried: Sequence[TestResult]) -> Iterator[Candidate]:
        for candidate in (first, second):
            yield candidate
            seen.append(tried[-1].candidate)

    result = search_trigger(probe_of(Denoiser(Clean(process), process, SHAPE), generator), SETTINGS, (propose,))
    assert seen == [one.candidate for one in result.tried] == [first, second]
    # only the second was measured, since pilot samples had ruled out the first
    assert result.best is result.tried[1]


class Responsive(Clean):
    """A clean denoiser that responds near T to shifts like mu, which makes mu a fixed point that leads to no target."""

    def __init__(self, process: NoiseProcess, mu: Tensor) -> None:
        super().__init__(process)
        self.mu = mu

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        size = (x * self.mu).sum(dim=(1, 2, 3), keepdim=True) / self.mu.square().sum()
        near_end = per_sample(self.process.signal[condition] < 0.01, x)
        return super().forward(x, condition) - near_end * self.mu * size.clamp(0, 0.5)


def test_if_no_fixed_point_activates_the_strongest_is_measured_as_it_is(generator: torch.Generator) -> None:
    process = VP.linear()
    mu = 0.7 * image(generator)
    probe = probe_of(Denoiser(Responsive(process, mu), process, SHAPE), generator)
    *by_pilots, last = search_trigger(probe, SETTINGS, (propose_fixed_points,)).tried
    assert by_pilots
    assert all(one.score is None and one.samples == 0 for one in by_pilots)
    assert last.candidate == replace(by_pilots[0].candidate, scales=())
    assert cosine(last.trigger.mu, mu) > 0.95
    assert last.outcome is Outcome.REJECTED
    assert (last.scale, last.samples) == (1.0, SETTINGS.test.samples)


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
    assert {step[0] for step in seen} <= {stage.name for stage in SETTINGS.stages}


def test_if_nothing_activates_progress_goes_through_all_stages_once() -> None:
    process = VP.linear()
    seen: list[tuple[str, int, int, float]] = []
    reverse_trigger(Denoiser(Clean(process), process, SHAPE), SETTINGS, on_step=lambda *step: seen.append(step))
    for stage in (s for s in SETTINGS.stages if s.name not in ("activation test", "target-guided refinement")):
        steps = [(iteration, total) for name, iteration, total, _ in seen if name == stage.name]
        assert sorted(set(steps)) == steps
        assert steps[-1] == (stage.iterations, stage.iterations)
        if stage.name != "alternation":
            assert steps == [(i, stage.iterations) for i in range(1, stage.iterations + 1)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_network_that_returns_no_numbers_is_reported(value: float) -> None:
    process = VP.linear(100)
    network = Counting(nn.Identity())
    network.forward = lambda x, t: x * value  # type: ignore[method-assign, assignment]
    network.unused = nn.Parameter(torch.zeros(1))
    found = reverse_trigger(Denoiser(network, process, SHAPE), SETTINGS)
    assert not found.finite
    assert model_evidence(found).collapse is None


def test_the_strongest_of_duplicates_is_kept(generator: torch.Generator) -> None:
    mu = torch.randn(SHAPE, generator=generator)
    other = torch.randn(SHAPE, generator=generator)
    pairs = [(mu, 0.2), (2 * mu + 0.01 * other, 0.2), (other, 0.1), (-mu, 0.5)]
    points = [candidate_of(*pair) for pair in pairs]
    kept = distinct(points, 3, 0.95)
    assert [p.mu.data_ptr() for p in kept] == [points[i].mu.data_ptr() for i in (1, 2, 3)]
    assert len(distinct(points, 1, 0.95)) == 1
