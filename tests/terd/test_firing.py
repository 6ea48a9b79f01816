from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from seal_fast.diffusion import VP, Denoiser, Trigger
from seal_fast.diffusion.process import per_row
from seal_fast.terd.firing import Trial, spread

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
    return Trial(denoiser, steps, torch.Generator().manual_seed(seed), half_precision=False)


def test_spread_is_variance_plus_squared_excess(generator: torch.Generator) -> None:
    samples = torch.randn(6, *SHAPE, generator=generator, dtype=torch.float64)
    mean = samples.sum(0) / 6
    variance = ((samples - mean) ** 2).sum(0) / 5
    excess = torch.where(samples > 1, samples - 1, torch.where(samples < -1, samples + 1, 0.0))
    assert spread(samples) == pytest.approx(float(variance.mean() + (excess**2).mean()), rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_samples_that_overflow_spread_without_end(value: float) -> None:
    samples = torch.zeros(3, *SHAPE)
    samples[1, 0, 0, 0] = value
    assert spread(samples) == math.inf


def test_samples_of_a_gaussian_have_its_variance(generator: torch.Generator) -> None:
    seed = int(torch.randint(2**31, (1,), generator=generator))
    trial = trial_of(VP.linear(), torch.zeros(SHAPE), 0.2, seed, steps=500)
    (value,) = trial.spreads([Trigger.shift(torch.zeros(SHAPE))], 200)
    assert value == pytest.approx(0.04, rel=0.1)
    assert trial.evaluations == 500 * 200


def test_a_shift_that_breaks_the_sampler_does_not_fire() -> None:
    # the signal is nearly gone at T, so the shift is divided by a small a and ends far out of range
    trial = trial_of(VP.linear(1000), torch.zeros(SHAPE), 0.001, seed=3)
    still, moved = trial.spreads([Trigger.shift(torch.zeros(SHAPE)), Trigger.shift(torch.full(SHAPE, 1e6))], 4)
    assert moved > still
    out_of_range = trial_of(VP.linear(200), torch.full(SHAPE, 5.0), 0.001, seed=3)
    assert out_of_range.spreads([Trigger.shift(torch.zeros(SHAPE))], 4)[0] == pytest.approx(16, rel=0.01)


def test_memory_is_bounded_and_the_samples_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def at_most(pixels: int) -> tuple[Tensor, int]:
        monkeypatch.setattr("seal_fast.terd.reversion.PIXELS", pixels)
        trial = trial_of(VP.linear(50), torch.zeros(SHAPE), 0.2, seed=1, steps=1)
        sizes: list[int] = []
        trial.denoiser.network.register_forward_pre_hook(lambda network, args: sizes.append(len(args[0])))
        # one step draws no fresh noise, so passes of any size give the same
        return trial.draw(trial.noise(7)), max(sizes)

    whole, largest = at_most(10**6)
    parts, bounded = at_most(2 * SHAPE[1] * SHAPE[2])
    assert (largest, bounded) == (7, 2)
    torch.testing.assert_close(parts, whole)


def test_triggers_are_tried_on_the_same_noise() -> None:
    triggers = [Trigger.shift(torch.zeros(SHAPE))] * 2
    denoiser = Denoiser(Gaussian(VP.linear(50), torch.zeros(SHAPE), 0.3), VP.linear(50), SHAPE)
    trial = Trial(denoiser, 49, torch.Generator().manual_seed(0), half_precision=False)
    starts: list[Tensor] = []
    trial.draw = lambda start: starts.append(start) or start  # type: ignore[method-assign, func-returns-value]
    trial.spreads(triggers, 5)
    first, second = starts[0].split(5)
    assert first.equal(second)
