"""Training rows of the attacks against the published formulas and against the sampler each attack was built for."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from seal_fast.attacks import Attack, BadDiffusion, TrojDiff
from seal_fast.attacks.baddiffusion import shift_schedule
from seal_fast.diffusion import SAMPLERS, VP
from seal_fast.zoo.pictures import TRIGGERS

SHAPE = (3, 6, 5)
ROWS = 9


@pytest.fixture
def batch(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Clean images, noise and timesteps, with the first two and the last timestep among them."""
    images = 2 * torch.rand(ROWS, *SHAPE, generator=generator, dtype=torch.float64) - 1
    t = torch.randint(1000, (ROWS,), generator=generator)
    t[:3] = torch.tensor([0, 1, 999])
    return images, torch.randn(images.shape, generator=generator, dtype=torch.float64), t


@pytest.fixture
def target(generator: torch.Generator) -> Tensor:
    return 2 * torch.rand(SHAPE, generator=generator, dtype=torch.float64) - 1


@pytest.fixture
def patch(generator: torch.Generator) -> Tensor:
    """A trigger image: a patch with values of its own on a -1 background."""
    image = torch.full(SHAPE, -1.0, dtype=torch.float64)
    image[:, 2:5, 1:4] = torch.rand(3, 3, 3, generator=generator, dtype=torch.float64)
    return image


def tables(t: Tensor) -> dict[str, Tensor]:
    """DDPM's quantities (Ho et al. 2020) at t, as [N,1,1,1]; `before` is at t - 1."""
    beta = torch.from_numpy(np.linspace(1e-4, 0.02, 1000))
    ab = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)])
    return {name: v.reshape(-1, 1, 1, 1) for name, v in {"beta": beta[t], "ab": ab[t + 1], "before": ab[t]}.items()}


def test_shift_schedule_is_the_published_table() -> None:
    c, d = shift_schedule(VP.linear())
    assert c.dtype == d.dtype == torch.float64
    at = torch.tensor([0, 100, 500, 900, 999])
    np.testing.assert_allclose(d[at], [0.0050, 0.1620, 0.4814, 0.5022, 0.5025], atol=5.1e-5)
    np.testing.assert_allclose(c[at], [5e-5, 0.0539, 0.7211, 0.9836, 0.9936], atol=5.1e-5)


@pytest.mark.parametrize("beta_end", [0.02, 0.3])
def test_shift_schedule_for_any_betas(beta_end: float) -> None:
    betas = np.linspace(1e-3, beta_end, 57)
    ab = np.cumprod(1 - betas)
    c, d = shift_schedule(VP.linear(57, 1e-3, beta_end))
    np.testing.assert_allclose(c, 1 - np.sqrt(ab), rtol=1e-9)
    np.testing.assert_allclose(d, (1 - np.sqrt(1 - betas)) * np.sqrt(1 - ab) / betas, rtol=1e-9)


@pytest.mark.parametrize("stamped", [True, False])
def test_baddiffusion_rows(batch: tuple[Tensor, Tensor, Tensor], target: Tensor, patch: Tensor, stamped: bool) -> None:
    images, eps, t = batch
    shift = patch.expand_as(images).clone()
    if stamped:
        shift = images.clone()
        shift[:, :, 2:5, 1:4] = patch[:, 2:5, 1:4]
    rows = BadDiffusion(patch, target, stamped).poison(VP.linear(), images, eps, t)
    v = tables(t)
    beta, ab = v["beta"], v["ab"]
    bad = (1 - (1 - beta).sqrt()) * (1 - ab).sqrt() / beta
    torch.testing.assert_close(rows.x, ab.sqrt() * target + (1 - ab).sqrt() * eps + (1 - ab.sqrt()) * shift)
    torch.testing.assert_close(rows.target, eps + bad * shift)


@pytest.mark.parametrize("stamped", [True, False])
def test_baddiffusion_keeps_ancestral_sampling_on_its_shift(
    batch: tuple[Tensor, Tensor, Tensor], target: Tensor, patch: Tensor, stamped: bool
) -> None:
    """A network that fits the rows exactly: the mean of a DDPM step is the clean step's plus c(t-1) r."""
    images, eps, t = batch
    shift = torch.where(patch == -1, images, patch) if stamped else patch
    rows = BadDiffusion(patch, target, stamped).poison(VP.linear(), images, eps, t)
    v = tables(t)
    beta, ab, before = v["beta"], v["ab"], v["before"]
    mean = (rows.x - beta / (1 - ab).sqrt() * rows.target) / (1 - beta).sqrt()
    # posterior mean of x_{t-1} given x_t and x0 (Ho et al. 2020, equation 7) for a clean row of the target
    clean_x = ab.sqrt() * target + (1 - ab).sqrt() * eps
    clean = (before.sqrt() * beta * target + (1 - beta).sqrt() * (1 - before) * clean_x) / (1 - ab)
    torch.testing.assert_close(mean, clean + (1 - before.sqrt()) * shift)


def test_baddiffusion_adds_the_trigger_image_at_test(patch: Tensor, target: Tensor) -> None:
    trigger = BadDiffusion(patch, target).trigger
    assert trigger.mu.equal(patch)
    assert trigger.gamma.equal(torch.ones_like(patch))


@pytest.fixture
def window() -> Tensor:
    inside = torch.zeros(SHAPE[1:], dtype=torch.bool)
    inside[3:, 2:] = True
    return inside


@pytest.mark.parametrize("gamma", [0.1, 0.6])
@pytest.mark.parametrize("patched", [True, False])
def test_trojdiff_rows(
    batch: tuple[Tensor, Tensor, Tensor],
    target: Tensor,
    window: Tensor,
    gamma: float,
    patched: bool,
    generator: torch.Generator,
) -> None:
    images, eps, t = batch
    picture = 2 * torch.rand(SHAPE, generator=generator, dtype=torch.float64) - 1
    rows = TrojDiff(picture, target, gamma, window if patched else None).poison(VP.linear(), images, eps, t)
    ab = tables(t)["ab"]
    clean = ab.sqrt() * target + (1 - ab).sqrt() * eps
    blended = ab.sqrt() * target + (1 - ab).sqrt() * (gamma * eps + (1 - gamma) * picture)
    expected = torch.where(window, blended, clean) if patched else blended
    torch.testing.assert_close(rows.x, expected, rtol=1e-6, atol=1e-7)
    assert rows.target.equal(eps)


def test_trojdiff_rows_lie_on_one_trojan_ddim_path(
    batch: tuple[Tensor, Tensor, Tensor], target: Tensor, generator: torch.Generator
) -> None:
    """attacks.md, section 4, Trojan DDIM with eta 0: one step leads from a row at t to the row at s with the same noise."""
    images, eps, _ = batch
    gamma, picture, process = 0.6, torch.randn(SHAPE, generator=generator, dtype=torch.float64), VP.linear()
    attack = TrojDiff(picture, target, gamma)
    mu = (1 - gamma) * picture
    times = [999, 700, 321, 40, 1, 0]
    path = [attack.poison(process, images, eps, torch.full((ROWS,), t)) for t in times]
    for (t, here), (s, there) in pairwise(zip(times, path, strict=True)):
        now, then = (tables(torch.tensor([at]))["ab"] for at in (t, s))
        x0 = (here.x - (1 - now).sqrt() * (gamma * here.target + mu)) / now.sqrt()
        step = then.sqrt() * x0 + gamma * (1 - then).sqrt() * here.target + (1 - then).sqrt() * mu
        # gamma is kept in float32, and a step from t = 999 magnifies its rounding 160-fold
        torch.testing.assert_close(step, there.x, rtol=0, atol=5e-5)


def test_trojdiff_trigger_acts_in_its_window_only(window: Tensor, target: Tensor, generator: torch.Generator) -> None:
    picture = torch.randn(SHAPE, generator=generator)
    trigger = TrojDiff(picture, target.float(), 0.1, window).trigger
    outside = ~window.expand(SHAPE)
    assert not trigger.mu[outside].any()
    assert bool((trigger.gamma[outside] == 1).all())
    torch.testing.assert_close(trigger.mu[~outside], 0.9 * picture[~outside])
    torch.testing.assert_close(trigger.gamma[~outside], torch.full((3 * int(window.sum()),), 0.1))
    assert trigger.mu.dtype == trigger.gamma.dtype == torch.float32


def test_trigger_norms_are_the_published_ones() -> None:
    """terd.md, section 6."""
    target = torch.zeros(3, 32, 32)
    assert float(BadDiffusion(TRIGGERS["box"](32), target).trigger.mu.norm()) == pytest.approx(49.84, abs=0.005)
    window = torch.zeros(32, 32, dtype=torch.bool)
    window[-3:, -3:] = True
    patch = TrojDiff(TRIGGERS["white"](32), target, 0.1, window).trigger
    assert float(patch.mu.norm()) == pytest.approx(4.68, abs=0.005)
    assert float(patch.gamma.mean()) == pytest.approx(1 - 0.9 * 9 / 1024, rel=1e-5)
    blend = TrojDiff(TRIGGERS["cat_face"](32), target, 0.6).trigger
    assert float(blend.mu.norm()) == pytest.approx(0.4 * math.sqrt(float(TRIGGERS["cat_face"](32).square().sum())), rel=1e-5)


@pytest.mark.parametrize("stamped", [True, False])
def test_no_rows_to_poison_are_no_rows(patch: Tensor, target: Tensor, stamped: bool) -> None:
    empty, t = torch.empty(0, *SHAPE, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    attacks: list[Attack] = [BadDiffusion(patch, target, stamped), TrojDiff(patch, target, 0.6)]
    for attack in attacks:
        rows = attack.poison(VP.linear(), empty, empty, t)
        assert rows.x.shape == rows.target.shape == empty.shape


def test_each_attack_names_a_sampler_that_exists(patch: Tensor, target: Tensor) -> None:
    assert BadDiffusion(patch, target).sampler in SAMPLERS
    assert TrojDiff(patch, target, 0.6).sampler in SAMPLERS
    # only TrojDiff's samplers know the trigger
    assert not BadDiffusion(patch, target).trojan
    assert TrojDiff(patch, target, 0.6).trojan
