from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import VP, Denoiser
from seal_fast.diffusion.process import per_row
from seal_fast.noise_triggers.activation_test import Trial, collapse, dispersion, most_similar, pixelwise_median
from seal_fast.noise_triggers.probe import Probe

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


def trial_of(process: VP, mean: Tensor, width: float, seed: int, steps: int = 60) -> Trial:
    denoiser = Denoiser(Gaussian(process, mean, width), process, SHAPE)
    return Trial(Probe(denoiser, torch.Generator().manual_seed(seed), half_precision=False), "ddpm", steps)


@pytest.mark.parametrize("count", [5, 8])
def test_spread_is_that_of_the_median_sample(generator: torch.Generator, count: int) -> None:
    samples = torch.randn(count, *SHAPE, generator=generator)
    rows = samples.double().numpy().reshape(count, -1)
    excess = np.clip(np.abs(rows) - 1, 0, None)
    away = ((rows - np.median(rows, axis=0)) ** 2 + excess**2).mean(axis=1)
    assert dispersion(samples) == pytest.approx(np.median(away), rel=1e-5)


def test_a_minority_of_samples_does_not_move_the_spread(generator: torch.Generator) -> None:
    alike = 0.5 + 0.01 * torch.randn(10, *SHAPE, generator=generator)
    some_fail = torch.cat([alike, torch.rand(2, *SHAPE, generator=generator) - 0.9])
    assert dispersion(some_fail) == pytest.approx(dispersion(alike), rel=0.5)
    torch.testing.assert_close(pixelwise_median(some_fail), pixelwise_median(alike), atol=0.02, rtol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_samples_that_overflow_spread_without_end(value: float) -> None:
    samples = torch.zeros(3, *SHAPE)
    samples[1, 0, 0, 0] = value
    assert dispersion(samples) == math.inf


def test_samples_of_a_gaussian_have_its_variance(generator: torch.Generator) -> None:
    seed = int(torch.randint(2**31, (1,), generator=generator))
    trial = trial_of(VP.linear(), torch.zeros(SHAPE), 0.2, seed, steps=500)
    # so many steps instead of infinitely many make it 7% less, give or take 1%
    assert dispersion(trial.clean(200)) == pytest.approx(0.04, rel=0.13)
    assert trial.probe.evaluations == 500 * 200


def test_a_shift_that_breaks_the_sampler_does_not_fire() -> None:
    # the signal is nearly gone at T, so the shift is divided by a small a and ends far out of range
    trial = trial_of(VP.linear(1000), torch.zeros(SHAPE), 0.001, seed=3)
    still, moved = trial.triggered([Trigger.shift(torch.zeros(SHAPE)), Trigger.shift(torch.full(SHAPE, 1e6))], 4)
    assert dispersion(moved) > dispersion(still)
    out_of_range = trial_of(VP.linear(200), torch.full(SHAPE, 5.0), 0.001, seed=3)
    assert dispersion(out_of_range.clean(4)) == pytest.approx(16, rel=0.01)


def test_memory_is_bounded_and_the_samples_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def at_most(pixels: int) -> tuple[Tensor, int]:
        monkeypatch.setattr("seal_fast.noise_triggers.reversion.PIXELS", pixels)
        trial = trial_of(VP.linear(50), torch.zeros(SHAPE), 0.2, seed=1, steps=1)
        sizes: list[int] = []
        trial.probe.denoiser.network.register_forward_pre_hook(lambda network, args: sizes.append(len(args[0])))
        # one step draws no fresh noise, so passes of any size give the same
        return trial.draw(trial.probe.noise(7)), max(sizes)

    whole, largest = at_most(10**6)
    parts, bounded = at_most(2 * SHAPE[1] * SHAPE[2])
    assert (largest, bounded) == (7, 2)
    torch.testing.assert_close(parts, whole)


class Recording(Trial):
    """Keeps what samples start from, which is all it draws."""

    def draw(self, start: Tensor) -> Tensor:
        self.starts = [*getattr(self, "starts", []), start]
        return start


def recording(seed: int) -> Recording:
    denoiser = Denoiser(Gaussian(VP.linear(50), torch.zeros(SHAPE), 0.3), VP.linear(50), SHAPE)
    return Recording(Probe(denoiser, torch.Generator().manual_seed(seed), half_precision=False), "ddpm", 49)


def test_triggers_are_tried_on_the_same_noise(generator: torch.Generator) -> None:
    trial, mu = recording(0), torch.randn(SHAPE, generator=generator)
    first, second = trial.triggered([Trigger.shift(torch.zeros(SHAPE)), Trigger.shift(mu)], 5)
    torch.testing.assert_close(second - first, mu.expand(5, *SHAPE))
    assert not trial.triggered([Trigger.shift(mu)], 5)[0].equal(second)


def test_samples_without_a_trigger_are_drawn_once() -> None:
    trial = recording(0)
    few, many = trial.clean(3), trial.clean(8)
    assert many[:3].equal(few)
    assert trial.clean(5).equal(many[:5])
    assert [len(start) for start in trial.starts] == [3, 5]


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


def test_collapse_is_the_ratio_of_spreads_for_a_new_image(generator: torch.Generator) -> None:
    clean = 0.1 * torch.randn(12, *SHAPE, generator=generator)
    triggered = nearly(torch.rand(SHAPE, generator=generator).round() - 0.5, generator)
    assert collapse(triggered, clean) == pytest.approx(dispersion(clean) / dispersion(triggered), rel=1e-6)


def test_samples_that_are_alike_are_told_from_the_others(generator: torch.Generator) -> None:
    samples = torch.randn(11, 3, 6, 5, generator=generator)
    same = torch.randperm(11, generator=generator)[:4]
    samples[same] = torch.randn(3, 6, 5, generator=generator) + 0.1 * torch.randn(4, 3, 6, 5, generator=generator)
    assert sorted(most_similar(samples, 4).tolist()) == sorted(same.tolist())
