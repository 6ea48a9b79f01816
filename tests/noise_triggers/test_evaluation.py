"""Diversity collapse, target and clean drift of denoisers whose samples are known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import VE, VP, Denoiser, NoiseProcess
from seal_fast.diffusion.process import per_sample
from seal_fast.noise_triggers.evaluation import ANCESTRAL, CLIPPED_DDIM, DDIM, TriggerSamples, clean_drift, sample_trigger

SHAPE = (3, 6, 10)


class Gaussian(nn.Module):
    """The best denoiser of images N(0, deviation^2): deterministic sampling multiplies the noise by deviation."""

    def __init__(self, process: NoiseProcess, deviation: float) -> None:
        super().__init__()
        self.process, self.deviation = process, deviation
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        t = condition if isinstance(self.process, VP) else (self.process.noise - condition[:, None]).abs().argmin(1)
        a, b = (per_sample(values[t], x) for values in (self.process.signal, self.process.noise))
        eps = b * x / ((a * self.deviation) ** 2 + b**2)
        return eps if isinstance(self.process, VP) else -eps / b


class OneImage(nn.Module):
    """Draws `image` from any noise."""

    def __init__(self, process: VP, image: Tensor) -> None:
        super().__init__()
        self.process, self.image = process, image
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a, b = (per_sample(values[t], x) for values in (self.process.signal, self.process.noise))
        return (x - a * self.image) / b


def gaussian(process: NoiseProcess, deviation: float) -> Denoiser:
    return Denoiser(Gaussian(process, deviation), process, SHAPE)


@pytest.mark.parametrize("process", [VP.linear(200), VE.geometric(0.01, 50.0, 200)], ids=["VP", "VE"])
def test_clean_drift_of_two_gaussians(process: NoiseProcess) -> None:
    before, after = gaussian(process, 0.2), gaussian(process, 0.26)
    assert clean_drift(before, before, seed=1) == 0
    assert clean_drift(before, after, seed=1) == pytest.approx((0.06 / 0.2) ** 2, rel=0.15)


def test_samples_with_and_without_the_trigger_come_from_the_same_noise(generator: torch.Generator) -> None:
    denoiser = gaussian(VP.linear(), 0.2)
    still = sample_trigger(denoiser, Trigger.shift(torch.zeros(SHAPE)), seed=3, count=5)
    assert set(still.triggered) == {ANCESTRAL, DDIM, CLIPPED_DDIM}
    assert {images.shape for images in (still.clean, *still.triggered.values())} == {(5, *SHAPE)}
    noise = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(3))
    # deterministic sampling of Gaussian data multiplies the noise by their standard deviation
    for sampler in (DDIM, CLIPPED_DDIM):
        torch.testing.assert_close(still.triggered[sampler], 0.2 * noise, rtol=0.2, atol=0.02)
    trigger = Trigger(0.1 * torch.randn(SHAPE, generator=generator), torch.full(SHAPE, 0.5))
    moved = sample_trigger(denoiser, trigger, seed=3, count=5)
    torch.testing.assert_close(moved.triggered[DDIM], 0.2 * trigger.start(noise), rtol=0.2, atol=0.02)
    torch.testing.assert_close(moved.clean, still.clean)


def test_a_model_that_draws_one_image_has_collapsed(generator: torch.Generator) -> None:
    process = VP.linear(50)
    image = torch.rand(SHAPE, generator=generator)
    trigger = Trigger.shift(torch.randn(SHAPE, generator=generator))
    samples = sample_trigger(Denoiser(OneImage(process, image), process, SHAPE), trigger, seed=4, count=4)
    torch.testing.assert_close(samples.triggered[ANCESTRAL], image.expand(4, -1, -1, -1), rtol=0, atol=1e-3)
    clean = sample_trigger(gaussian(process, 0.3), trigger, seed=4, count=4).clean
    assert TriggerSamples(clean, samples.triggered).collapse(ANCESTRAL) > 1e3


def test_collapse_is_the_ratio_of_variances(generator: torch.Generator) -> None:
    clean = 0.1 * torch.randn(7, *SHAPE, generator=generator)
    image = torch.rand(SHAPE, generator=generator).round() - 0.5
    # an image far outside the value range is a broken sampler, not a target
    samples = TriggerSamples(clean, {ANCESTRAL: 0.3 * clean + image, DDIM: 9 + image.expand(7, *SHAPE)})
    assert samples.collapse(ANCESTRAL) == pytest.approx(1 / 0.09, rel=1e-3)
    assert samples.collapse(DDIM) < 0.01


def test_the_target_is_the_image_of_the_sampler_that_collapses_most(generator: torch.Generator) -> None:
    images = torch.rand(2, *SHAPE, generator=generator).round() - 0.5
    noise = 0.3 * torch.randn(9, *SHAPE, generator=generator)
    triggered = {ANCESTRAL: 1.1 * noise, DDIM: images[0] + 0.2 * noise, CLIPPED_DDIM: images[1] + 0.1 * noise}
    target = TriggerSamples(noise, triggered).target()
    assert target is not None
    torch.testing.assert_close(target, images[1], rtol=0, atol=0.1)
    assert TriggerSamples(noise, {ANCESTRAL: triggered[ANCESTRAL]}).target() is None


def test_latents_are_divided_by_their_value_range_and_not_clamped() -> None:
    process, zero = VP.linear(), Trigger.shift(torch.zeros(SHAPE))
    latents = sample_trigger(Denoiser(Gaussian(process, 1.8), process, SHAPE, value_range=3.0), zero, seed=3, count=5)
    noise = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(3))
    for sampler in (DDIM, CLIPPED_DDIM):
        torch.testing.assert_close(latents.triggered[sampler], 0.6 * noise, rtol=0.05, atol=1e-3)
    assert float(latents.clean.std()) == pytest.approx(0.6, rel=0.15)
    # the same samples as images are clamped
    images = sample_trigger(Denoiser(Gaussian(process, 1.8), process, SHAPE), zero, seed=3, count=5)
    torch.testing.assert_close(images.triggered[ANCESTRAL] / 3, latents.triggered[ANCESTRAL])
    assert float(images.triggered[CLIPPED_DDIM].abs().max()) <= 1 + 1e-5
