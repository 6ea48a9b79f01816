"""Samples with and without triggers, how similar they are, and the sequential test."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import VP, Denoiser
from seal_fast.diffusion.process import per_row
from seal_fast.noise_triggers.activation_test import ActivationTest, collapse, dispersion, most_similar, pixelwise_median
from seal_fast.noise_triggers.candidates import Candidate, Origin, Outcome
from seal_fast.noise_triggers.probe import PIXELS_PER_PASS, Probe, TriggeredSampler
from seal_fast.noise_triggers.search_settings import ActivationTestSettings

SHAPE = (3, 7, 5)


class Gaussian(nn.Module):
    """The exact denoiser of images N(mean, width^2)."""

    def __init__(self, process: VP, mean: Tensor, width: float) -> None:
        super().__init__()
        self.process, self.mean, self.width = process, mean, width
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a, b = (per_row(values[t], x) for values in (self.process.signal, self.process.noise))
        return b * (x - a * self.mean) / ((a * self.width) ** 2 + b**2)


def sampler_of(
    process: VP, mean: Tensor, width: float, seed: int, steps: int = 60, pixels_per_pass: int = PIXELS_PER_PASS
) -> TriggeredSampler:
    denoiser = Denoiser(Gaussian(process, mean, width), process, SHAPE)
    return Probe(denoiser, seed, half_precision=False, pixels_per_pass=pixels_per_pass).sampler("ddpm", steps)


@pytest.mark.parametrize("count", [5, 8])
def test_dispersion_is_that_of_the_median_sample(generator: torch.Generator, count: int) -> None:
    samples = torch.randn(count, *SHAPE, generator=generator)
    flat = samples.double().numpy().reshape(count, -1)
    excess = np.clip(np.abs(flat) - 1, 0, None)
    away = ((flat - np.median(flat, axis=0)) ** 2 + excess**2).mean(axis=1)
    assert dispersion(samples) == pytest.approx(np.median(away), rel=1e-5)


def test_a_minority_of_samples_does_not_move_the_dispersion(generator: torch.Generator) -> None:
    similar = 0.5 + 0.01 * torch.randn(10, *SHAPE, generator=generator)
    some_fail = torch.cat([similar, torch.rand(2, *SHAPE, generator=generator) - 0.9])
    assert dispersion(some_fail) == pytest.approx(dispersion(similar), rel=0.5)
    torch.testing.assert_close(pixelwise_median(some_fail), pixelwise_median(similar), atol=0.02, rtol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_samples_that_overflow_have_an_infinite_dispersion(value: float) -> None:
    samples = torch.zeros(3, *SHAPE)
    samples[1, 0, 0, 0] = value
    assert dispersion(samples) == math.inf


def test_samples_of_a_gaussian_have_its_variance(generator: torch.Generator) -> None:
    seed = int(torch.randint(2**31, (1,), generator=generator))
    sampler = sampler_of(VP.linear(), torch.zeros(SHAPE), 0.2, seed, steps=500)
    # so many steps instead of infinitely many make it 7% less, give or take 1%
    assert dispersion(sampler.clean(200)) == pytest.approx(0.04, rel=0.13)
    assert sampler.probe.evaluations == 500 * 200


def test_a_shift_that_breaks_the_sampler_is_dispersed() -> None:
    # the signal is nearly gone at T, so the shift is divided by a small a and ends far out of range
    sampler = sampler_of(VP.linear(1000), torch.zeros(SHAPE), 0.001, seed=3)
    still, moved = sampler.triggered([Trigger.shift(torch.zeros(SHAPE)), Trigger.shift(torch.full(SHAPE, 1e6))], 4)
    assert dispersion(moved) > dispersion(still)
    out_of_range = sampler_of(VP.linear(200), torch.full(SHAPE, 5.0), 0.001, seed=3)
    assert dispersion(out_of_range.clean(4)) == pytest.approx(16, rel=0.01)


def test_memory_is_bounded_and_the_samples_are_the_same() -> None:
    def at_most(pixels: int) -> tuple[Tensor, int]:
        sampler = sampler_of(VP.linear(50), torch.zeros(SHAPE), 0.2, seed=1, steps=1, pixels_per_pass=pixels)
        sizes: list[int] = []
        sampler.probe.denoiser.network.register_forward_pre_hook(lambda network, args: sizes.append(len(args[0])))
        # one step draws no fresh noise, so passes of any size give the same
        return sampler.draw(sampler.probe.noise(7)), max(sizes)

    whole, largest = at_most(10**6)
    parts, bounded = at_most(2 * SHAPE[1] * SHAPE[2])
    assert (largest, bounded) == (7, 2)
    torch.testing.assert_close(parts, whole)


class Recording(TriggeredSampler):
    """Returns the starts of samples in place of samples, and remembers them."""

    def draw(self, start: Tensor) -> Tensor:
        self.starts = [*getattr(self, "starts", []), start]
        return start


def recording(seed: int) -> Recording:
    denoiser = Denoiser(Gaussian(VP.linear(50), torch.zeros(SHAPE), 0.3), VP.linear(50), SHAPE)
    return Recording(Probe(denoiser, seed, half_precision=False), "ddpm", 49)


def test_triggers_are_tested_on_the_same_noise(generator: torch.Generator) -> None:
    sampler, mu = recording(0), torch.randn(SHAPE, generator=generator)
    first, second = sampler.triggered([Trigger.shift(torch.zeros(SHAPE)), Trigger.shift(mu)], 5)
    torch.testing.assert_close(second - first, mu.expand(5, *SHAPE))
    assert not sampler.triggered([Trigger.shift(mu)], 5)[0].equal(second)


def test_samples_without_a_trigger_are_drawn_once() -> None:
    sampler = recording(0)
    few, many = sampler.clean(3), sampler.clean(8)
    assert many[:3].equal(few)
    assert sampler.clean(5).equal(many[:5])
    assert [len(start) for start in sampler.starts] == [3, 5]


def nearly(image: Tensor, generator: torch.Generator) -> Tensor:
    """Twelve samples that are nearly one image."""
    return image + 0.01 * torch.randn(12, *SHAPE, generator=generator)


def test_an_image_the_model_draws_by_itself_is_no_collapse(generator: torch.Generator) -> None:
    clean = torch.rand(12, *SHAPE, generator=generator) - 0.5
    samples = nearly(torch.rand(SHAPE, generator=generator) - 0.5, generator)
    assert collapse(samples, clean) > 100
    assert collapse(samples, torch.cat([clean[3:], samples[:3]])) < 10


def test_a_plain_colour_is_no_collapse(generator: torch.Generator) -> None:
    clean = torch.rand(12, *SHAPE, generator=generator) - 0.5
    colour = torch.tensor([-0.9, 0.2, 0.8])[:, None, None].expand(SHAPE)
    assert collapse(nearly(colour, generator), clean) < 1


def test_collapse_is_the_ratio_of_dispersions_for_a_new_image(generator: torch.Generator) -> None:
    clean = 0.1 * torch.randn(12, *SHAPE, generator=generator)
    triggered = nearly(torch.rand(SHAPE, generator=generator).round() - 0.5, generator)
    assert collapse(triggered, clean) == pytest.approx(dispersion(clean) / dispersion(triggered), rel=1e-6)


def test_similar_samples_are_distinguished_from_the_others(generator: torch.Generator) -> None:
    samples = torch.randn(11, 3, 6, 5, generator=generator)
    same = torch.randperm(11, generator=generator)[:4]
    samples[same] = torch.randn(3, 6, 5, generator=generator) + 0.1 * torch.randn(4, 3, 6, 5, generator=generator)
    assert sorted(most_similar(samples, 4).tolist()) == sorted(same.tolist())


class Stamping(Gaussian):
    """Draws one image where its input has a positive mean, as a backdoor does whose trigger is a bright shift."""

    def __init__(self, process: VP, target: Tensor) -> None:
        super().__init__(process, torch.zeros(target.shape), 0.3)
        self.target = target

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a, b = (per_row(values[t], x) for values in (self.process.signal, self.process.noise))
        bright = x.mean(dim=(1, 2, 3), keepdim=True) > 0.25
        return torch.where(bright, (x - a * self.target) / b, super().forward(x, t))


SETTINGS = ActivationTestSettings(ancestral_steps=30, deterministic_steps=30)


def candidate_of(mu: Tensor, scales: tuple[float, ...], accept_above: float = SETTINGS.accept_above) -> Candidate:
    return Candidate(mu, torch.ones(mu.shape), 1.0, Origin.FIXED_POINT, "ddim", accept_above, scales)


def activation_test(generator: torch.Generator) -> ActivationTest:
    """A test of a denoiser that draws one bright image for bright noise; near the end of the process it sees that image."""
    process = VP.linear()
    target = 0.6 + 0.3 * torch.randn(SHAPE, generator=generator).sign()
    seed = int(torch.randint(2**31, (), generator=generator))
    return ActivationTest(Probe(Denoiser(Stamping(process, target), process, SHAPE), seed, half_precision=False), SETTINGS)


def test_a_trigger_that_activates_is_accepted_at_the_scale_nearest_its_own(generator: torch.Generator) -> None:
    result = activation_test(generator)(candidate_of(torch.ones(SHAPE), (0.01, 1.2, 2.0)))
    assert result.outcome is Outcome.ACCEPTED
    assert result.accepted
    assert result.scale == 1.2
    assert result.trigger.mu.equal(1.2 * torch.ones(SHAPE))
    assert result.samples == SETTINGS.samples
    assert result.score is not None
    assert result.score > SETTINGS.accept_above


def test_a_trigger_that_does_nothing_is_left_after_its_pilots(generator: torch.Generator) -> None:
    test = activation_test(generator)
    result = test(candidate_of(-torch.ones(SHAPE), (1.0, 2.0)))
    assert result.outcome is Outcome.DISPERSED_PILOTS
    assert (result.score, result.scale, result.samples) == (None, None, 0)
    pilots, steps = 2 * SETTINGS.pilot_samples, SETTINGS.deterministic_steps
    clean = SETTINGS.samples
    assert test.samplers["ddim"].probe.evaluations == steps * (pilots + clean)


def test_without_scales_a_candidate_is_measured_as_it_is(generator: torch.Generator) -> None:
    test = activation_test(generator)
    rejected = test(candidate_of(-torch.ones(SHAPE), ()))
    assert rejected.outcome is Outcome.REJECTED
    assert (rejected.scale, rejected.consensus) == (1.0, None)
    assert test(candidate_of(torch.ones(SHAPE), ())).accepted
    undecided = test(candidate_of(torch.ones(SHAPE), (), accept_above=math.inf))
    assert undecided.outcome is Outcome.UNDECIDED


def test_a_trigger_that_changes_nothing_scores_1(generator: torch.Generator) -> None:
    test = activation_test(generator)
    result = test(candidate_of(torch.zeros(SHAPE), SETTINGS.scales))
    assert (result.outcome, result.score) == (Outcome.NO_TRIGGER, 1.0)
    assert result.clean_dispersion == dispersion(test.samplers["ddim"].clean(SETTINGS.samples))


@pytest.mark.parametrize("case", ["image", "plain colour", "reduced variance"])
def test_a_consensus_is_a_new_image(generator: torch.Generator, case: str) -> None:
    test = activation_test(generator)
    plain = torch.full(SHAPE, 0.5)
    shared = plain if case == "plain colour" else torch.rand(SHAPE, generator=generator).round() - 0.5
    gamma = torch.full(SHAPE, 0.6 if case == "reduced variance" else 1.0)
    candidate = Candidate(torch.ones(SHAPE), gamma, 1.0, Origin.FIXED_POINT, "ddim", 16.0, SETTINGS.scales)
    pilots = list(test.samplers["ddim"].clean(SETTINGS.pilot_samples * len(SETTINGS.scales)).split(SETTINGS.pilot_samples))
    # as many as are needed, most of them at the third scale
    for scale, count in enumerate((0, 1, 2, 0, 1)):
        noise = 0.01 * torch.randn(count, *SHAPE, generator=generator)
        pilots[scale] = torch.cat([shared + noise, pilots[scale][count:]])
    found = test.consensus(candidate, pilots)
    if case != "image":
        assert found is None
        return
    assert found is not None
    torch.testing.assert_close(found.image, shared, rtol=0, atol=0.04)
    assert found.scale == SETTINGS.scales[2]
    assert found.score > SETTINGS.reject_below
