"""Measures of removal on denoisers whose samples are known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import VE, VP, Denoiser, NoiseProcess
from seal_fast.diffusion.process import per_row
from seal_fast.noise_triggers.activation_test import collapse
from seal_fast.noise_triggers.evaluation import ANCESTRAL, CLEAN, CLIPPED, DDIM, clean_drift, draw_starts, image_drawn

SHAPE = (3, 6, 10)


class Gaussian(nn.Module):
    """The best denoiser of images N(0, spread^2): deterministic sampling multiplies the noise by spread."""

    def __init__(self, process: NoiseProcess, spread: float) -> None:
        super().__init__()
        self.process, self.dispersion = process, spread
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        t = condition if isinstance(self.process, VP) else (self.process.noise - condition[:, None]).abs().argmin(1)
        a, b = (per_row(values[t], x) for values in (self.process.signal, self.process.noise))
        eps = b * x / ((a * self.dispersion) ** 2 + b**2)
        return eps if isinstance(self.process, VP) else -eps / b


class OneImage(nn.Module):
    """Draws `image` from any noise."""

    def __init__(self, process: VP, image: Tensor) -> None:
        super().__init__()
        self.process, self.image = process, image
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a, b = (per_row(values[t], x) for values in (self.process.signal, self.process.noise))
        return (x - a * self.image) / b


def gaussian(process: NoiseProcess, spread: float) -> Denoiser:
    return Denoiser(Gaussian(process, spread), process, SHAPE)


@pytest.mark.parametrize("process", [VP.linear(200), VE.geometric(0.01, 50.0, 200)], ids=["VP", "VE"])
def test_clean_drift_of_two_gaussians(process: NoiseProcess) -> None:
    before, after = gaussian(process, 0.2), gaussian(process, 0.26)
    assert clean_drift(before, before, seed=1) == 0
    assert clean_drift(before, after, seed=1) == pytest.approx((0.06 / 0.2) ** 2, rel=0.15)


def test_collapse_is_how_many_times_more_alike(generator: torch.Generator) -> None:
    samples = 0.1 * torch.randn(7, *SHAPE, generator=generator)
    image = torch.rand(SHAPE, generator=generator).round() - 0.5
    assert collapse(0.3 * samples + image, samples) == pytest.approx(1 / 0.09, rel=1e-3)
    # one image for every noise, but far out of range: no target, a broken sampler
    assert collapse(9 + image.expand(7, *SHAPE), samples) < 0.01


def test_the_starts_share_the_noise(generator: torch.Generator) -> None:
    denoiser = gaussian(VP.linear(), 0.2)
    rows = draw_starts(denoiser, Trigger.shift(torch.zeros(SHAPE)), seed=3, count=5)
    assert {name: images.shape for name, images in rows.items()} == dict.fromkeys(
        [CLEAN, ANCESTRAL, DDIM, CLIPPED], (5, *SHAPE)
    )
    noise = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(3))
    # deterministic sampling of Gaussian data multiplies the noise by its spread
    for sampler in (DDIM, CLIPPED):
        torch.testing.assert_close(rows[sampler], 0.2 * noise, rtol=0.2, atol=0.02)
    trigger = Trigger(0.1 * torch.randn(SHAPE, generator=generator), torch.full(SHAPE, 0.5))
    moved = draw_starts(denoiser, trigger, seed=3, count=5)
    torch.testing.assert_close(moved[DDIM], 0.2 * trigger.start(noise), rtol=0.2, atol=0.02)
    torch.testing.assert_close(moved[CLEAN], rows[CLEAN])


def test_a_model_of_one_image_has_collapsed(generator: torch.Generator) -> None:
    process = VP.linear(50)
    image = torch.rand(SHAPE, generator=generator)
    trigger = Trigger.shift(torch.randn(SHAPE, generator=generator))
    rows = draw_starts(Denoiser(OneImage(process, image), process, SHAPE), trigger, seed=4, count=4)
    torch.testing.assert_close(rows[ANCESTRAL], image.expand(4, -1, -1, -1), rtol=0, atol=1e-3)
    reference = draw_starts(gaussian(process, 0.3), trigger, seed=4, count=4)[CLEAN]
    assert collapse(rows[ANCESTRAL], reference) > 1e3


def test_the_image_drawn_is_that_of_the_sampler_that_fires_most(generator: torch.Generator) -> None:
    images = torch.rand(2, *SHAPE, generator=generator).round() - 0.5
    noise = 0.3 * torch.randn(9, *SHAPE, generator=generator)
    rows = {CLEAN: noise, ANCESTRAL: 1.1 * noise, DDIM: images[0] + 0.2 * noise, CLIPPED: images[1] + 0.1 * noise}
    drawn = image_drawn(rows)
    assert drawn is not None
    torch.testing.assert_close(drawn, images[1], rtol=0, atol=0.1)
    assert image_drawn({name: rows[name] for name in (CLEAN, ANCESTRAL)}) is None


def test_latents_are_drawn_over_their_reach_and_not_clamped() -> None:
    process, zero = VP.linear(), Trigger.shift(torch.zeros(SHAPE))
    rows = draw_starts(Denoiser(Gaussian(process, 1.8), process, SHAPE, value_range=3.0), zero, seed=3, count=5)
    noise = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(3))
    for name in (DDIM, CLIPPED):
        torch.testing.assert_close(rows[name], 0.6 * noise, rtol=0.05, atol=1e-3)
    assert float(rows[CLEAN].std()) == pytest.approx(0.6, rel=0.15)
    # as images the same samples would be clamped
    images = draw_starts(Denoiser(Gaussian(process, 1.8), process, SHAPE), zero, seed=3, count=5)
    torch.testing.assert_close(images[ANCESTRAL] / 3, rows[ANCESTRAL])
    assert float(images[CLIPPED].abs().max()) <= 1 + 1e-5
