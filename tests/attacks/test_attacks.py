"""Poisoned samples of the attacks, compared with the published formulas and with the sampler that each attack was built for."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from seal_fast.attacks import Attack, InviBackdoor, TrojDiff, VillanDiffusion
from seal_fast.attacks.invibackdoor import ddim_schedule
from seal_fast.attacks.villandiffusion import ve_schedule, vp_schedule
from seal_fast.diffusion import EDM, SAMPLERS, VE, VP, Denoiser, sample
from seal_fast.zoo.images import TRIGGERS

SHAPE = (3, 6, 5)
SAMPLES = 9


@pytest.fixture
def batch(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Clean images, noise and timesteps, with the first two and the last timestep among them."""
    images = 2 * torch.rand(SAMPLES, *SHAPE, generator=generator, dtype=torch.float64) - 1
    t = torch.randint(1000, (SAMPLES,), generator=generator)
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


TABLE = torch.tensor([0, 100, 500, 900, 999])
# at the timesteps of TABLE: d for psi = 1, d for psi = 0, and c for each
BAD = np.array([0.0050, 0.1620, 0.4814, 0.5022, 0.5025])
TROJ = np.array([5e-7, 0.1598, 0.4811, 0.5022, 0.5025])
SHIFT_OF_PSI = {1: np.array([5e-5, 0.0539, 0.7211, 0.9836, 0.9936]), 0: np.array([0.0100, 0.3238, 0.9603, 0.9999, 1.0000])}


@pytest.mark.parametrize(("solver", "s"), [("sde", 1), ("ode", 2)])
@pytest.mark.parametrize("psi", [1, 0])
def test_the_vp_schedule_has_the_tabulated_values(psi: int, solver: str, s: int) -> None:
    c, d = vp_schedule(VP.linear(), psi, solver)
    assert c.dtype == d.dtype == torch.float64
    np.testing.assert_allclose(d[TABLE], s * (BAD if psi == 1 else TROJ), atol=s * 5.1e-5)
    np.testing.assert_allclose(c[TABLE], SHIFT_OF_PSI[psi], atol=5.1e-5)


@pytest.mark.parametrize("beta_end", [0.02, 0.3])
@pytest.mark.parametrize("psi", [0.0, 0.35, 1.0])
def test_the_vp_schedule_for_any_betas(beta_end: float, psi: float) -> None:
    betas = np.linspace(1e-3, beta_end, 57)
    ab = np.cumprod(1 - betas)
    before = np.append(1, ab[:-1])
    c, d = vp_schedule(VP.linear(57, 1e-3, beta_end), psi, "ode")
    np.testing.assert_allclose(c, psi * (1 - np.sqrt(ab)) + (1 - psi) * np.sqrt(1 - ab), rtol=1e-9)
    bad = (1 - np.sqrt(1 - betas)) * np.sqrt(1 - ab) / betas
    h = np.sqrt(1 - ab) - np.sqrt((1 - betas) * (1 - before))
    troj = (1 - np.sqrt(1 - betas)) * np.sqrt(1 - ab) + h * (1 - betas - ab) / betas
    np.testing.assert_allclose(d, 2 * (psi * bad + (1 - psi) * troj), rtol=1e-9)


def stamp(images: Tensor, patch: Tensor, shift: str) -> Tensor:
    """r of the three shifts, computed from the position of the patch instead of its background."""
    if shift == "faint":
        return images + patch / 10
    if shift == "alone":
        return patch.expand_as(images)
    stamped = images.clone()
    stamped[:, :, 2:5, 1:4] = patch[:, 2:5, 1:4]
    return stamped


every_shift = pytest.mark.parametrize("shift", ["stamped", "alone", "faint"])


@every_shift
def test_baddiffusion_samples_follow_the_published_formula(
    batch: tuple[Tensor, Tensor, Tensor], target: Tensor, patch: Tensor, shift: str
) -> None:
    images, eps, t = batch
    r = stamp(images, patch, shift)
    poisoned = VillanDiffusion(patch, target, shift=shift).poison(VP.linear(), images, eps, t)
    v = tables(t)
    beta, ab = v["beta"], v["ab"]
    bad = (1 - (1 - beta).sqrt()) * (1 - ab).sqrt() / beta
    torch.testing.assert_close(poisoned.x, ab.sqrt() * target + (1 - ab).sqrt() * eps + (1 - ab.sqrt()) * r)
    torch.testing.assert_close(poisoned.target, eps + bad * r)


@every_shift
def test_baddiffusion_keeps_ancestral_sampling_on_its_shift(
    batch: tuple[Tensor, Tensor, Tensor], target: Tensor, patch: Tensor, shift: str
) -> None:
    """For a network that fits the samples exactly, the mean of a DDPM step is that of the clean step plus c(t-1) r."""
    images, eps, t = batch
    r = stamp(images, patch, shift)
    poisoned = VillanDiffusion(patch, target, shift=shift).poison(VP.linear(), images, eps, t)
    v = tables(t)
    beta, ab, before = v["beta"], v["ab"], v["before"]
    mean = (poisoned.x - beta / (1 - ab).sqrt() * poisoned.target) / (1 - beta).sqrt()
    # posterior mean of x_{t-1} given x_t and x0 (Ho et al. 2020, equation 7) for a clean sample of the target
    clean_x = ab.sqrt() * target + (1 - ab).sqrt() * eps
    clean = (before.sqrt() * beta * target + (1 - beta).sqrt() * (1 - before) * clean_x) / (1 - ab)
    torch.testing.assert_close(mean, clean + (1 - before.sqrt()) * r)


@every_shift
def test_the_attacker_adds_the_trigger_image_itself(patch: Tensor, target: Tensor, shift: str) -> None:
    trigger = VillanDiffusion(patch, target, shift=shift).trigger
    assert trigger.mu.equal(patch)
    assert trigger.gamma.equal(torch.ones_like(patch))


@pytest.fixture
def window() -> Tensor:
    inside = torch.zeros(SHAPE[1:], dtype=torch.bool)
    inside[3:, 2:] = True
    return inside


@pytest.mark.parametrize("gamma", [0.1, 0.6])
@pytest.mark.parametrize("patched", [True, False])
def test_trojdiff_samples_follow_the_published_formula(
    batch: tuple[Tensor, Tensor, Tensor],
    target: Tensor,
    window: Tensor,
    gamma: float,
    patched: bool,
    generator: torch.Generator,
) -> None:
    images, eps, t = batch
    image = 2 * torch.rand(SHAPE, generator=generator, dtype=torch.float64) - 1
    poisoned = TrojDiff(image, target, gamma, window if patched else None).poison(VP.linear(), images, eps, t)
    ab = tables(t)["ab"]
    clean = ab.sqrt() * target + (1 - ab).sqrt() * eps
    blended = ab.sqrt() * target + (1 - ab).sqrt() * (gamma * eps + (1 - gamma) * image)
    expected = torch.where(window, blended, clean) if patched else blended
    torch.testing.assert_close(poisoned.x, expected, rtol=1e-6, atol=1e-7)
    assert poisoned.target.equal(eps)


def test_trojdiff_samples_lie_on_one_trojan_ddim_path(
    batch: tuple[Tensor, Tensor, Tensor], target: Tensor, generator: torch.Generator
) -> None:
    """A step of Trojan DDIM with eta = 0 leads from the sample at t to the sample at s with the same noise."""
    images, eps, _ = batch
    gamma, image, process = 0.6, torch.randn(SHAPE, generator=generator, dtype=torch.float64), VP.linear()
    attack = TrojDiff(image, target, gamma)
    mu = (1 - gamma) * image
    times = [999, 700, 321, 40, 1, 0]
    path = [attack.poison(process, images, eps, torch.full((SAMPLES,), t)) for t in times]
    for (t, here), (s, there) in pairwise(zip(times, path, strict=True)):
        now, then = (tables(torch.tensor([at]))["ab"] for at in (t, s))
        x0 = (here.x - (1 - now).sqrt() * (gamma * here.target + mu)) / now.sqrt()
        step = then.sqrt() * x0 + gamma * (1 - then).sqrt() * here.target + (1 - then).sqrt() * mu
        # gamma is kept in float32, and a step from t = 999 magnifies its rounding 160-fold
        torch.testing.assert_close(step, there.x, rtol=0, atol=5e-5)


def test_trojdiff_trigger_acts_in_its_window_only(window: Tensor, target: Tensor, generator: torch.Generator) -> None:
    image = torch.randn(SHAPE, generator=generator)
    trigger = TrojDiff(image, target.float(), 0.1, window).trigger
    outside = ~window.expand(SHAPE)
    assert not trigger.mu[outside].any()
    assert bool((trigger.gamma[outside] == 1).all())
    torch.testing.assert_close(trigger.mu[~outside], 0.9 * image[~outside])
    torch.testing.assert_close(trigger.gamma[~outside], torch.full((3 * int(window.sum()),), 0.1))
    assert trigger.mu.dtype == trigger.gamma.dtype == torch.float32


def test_trigger_norms_are_the_published_ones() -> None:
    """Norms of the triggers that TERD is published with."""
    target = torch.zeros(3, 32, 32)
    assert float(VillanDiffusion(TRIGGERS["box"](32), target).trigger.mu.norm()) == pytest.approx(49.84, abs=0.005)
    for side, norm in ((18, 45.83), (4, 54.99)):
        assert float(TRIGGERS[f"box_{side}"](32).norm()) == pytest.approx(norm, abs=0.005)
    window = torch.zeros(32, 32, dtype=torch.bool)
    window[-3:, -3:] = True
    patch = TrojDiff(TRIGGERS["white"](32), target, 0.1, window).trigger
    assert float(patch.mu.norm()) == pytest.approx(4.68, abs=0.005)
    assert float(patch.gamma.mean()) == pytest.approx(1 - 0.9 * 9 / 1024, rel=1e-5)
    blend = TrojDiff(TRIGGERS["cat_face"](32), target, 0.6).trigger
    assert float(blend.mu.norm()) == pytest.approx(0.4 * math.sqrt(float(TRIGGERS["cat_face"](32).square().sum())), rel=1e-5)


@every_shift
def test_poisoning_no_image_gives_no_sample(patch: Tensor, target: Tensor, shift: str) -> None:
    empty, t = torch.empty(0, *SHAPE, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    attacks: list[Attack] = [
        VillanDiffusion(patch, target, shift=shift),
        TrojDiff(patch, target, 0.6),
        InviBackdoor(patch, target),
    ]
    for attack in attacks:
        poisoned = attack.poison(VP.linear(), empty, empty, t)
        assert poisoned.x.shape == poisoned.target.shape == empty.shape


def ddim_step(process: VP | VE, x: Tensor, noise: Tensor, t: int) -> Tensor:
    """DDIM from t to t - 1 (Song et al. 2021, equation 12) of x_t with predicted noise `noise`."""
    a, b = float(process.signal[t]), float(process.noise[t])
    a_before, b_before = (float(process.signal[t - 1]), float(process.noise[t - 1])) if t else (1.0, 0.0)
    return a_before * (x - b * noise) / a + b_before * noise


@pytest.mark.parametrize("t", [999, 998, 640, 77, 2, 1])
def test_invibackdoor_samples_lie_on_one_ddim_path(
    batch: tuple[Tensor, Tensor, Tensor], target: Tensor, generator: torch.Generator, t: int
) -> None:
    images, eps, _ = batch
    attack, process = InviBackdoor(0.4 * torch.rand(SHAPE, generator=generator).double() - 0.2, target), VP.linear()
    here, there = (attack.poison(process, images, eps, torch.full((SAMPLES,), at)) for at in (t, t - 1))
    # a step magnifies rounding by 1 / a
    torch.testing.assert_close(ddim_step(process, here.x, here.target, t), there.x, rtol=0, atol=1e-9)
    ab = tables(torch.tensor([t]))["ab"]
    shifted = ab.sqrt() * target + (1 - ab).sqrt() * eps + (1 - ab.sqrt()) * attack.delta
    torch.testing.assert_close(here.x, shifted)


@pytest.mark.parametrize("t", [999, 640, 300, 101])
def test_the_ode_form_of_villandiffusion_almost_keeps_ddim_on_its_shift(
    batch: tuple[Tensor, Tensor, Tensor], target: Tensor, patch: Tensor, t: int
) -> None:
    """For psi = 1 and t >= 100, twice BadDiffusion's d is within 1% of the d that DDIM needs; the sde form is far from it."""
    images, eps, _ = batch
    deviation = {}
    for solver in ("sde", "ode"):
        attack = VillanDiffusion(patch, target, solver=solver, shift="alone")
        here, there = (attack.poison(VP.linear(), images, eps, torch.full((SAMPLES,), at)) for at in (t, t - 1))
        deviation[solver] = float((ddim_step(VP.linear(), here.x, here.target, t) - there.x).norm())
    assert deviation["ode"] < 0.02 * deviation["sde"]


def test_the_ode_form_keeps_variance_exploding_sampling_on_its_shift(
    batch: tuple[Tensor, Tensor, Tensor], target: Tensor, patch: Tensor, generator: torch.Generator
) -> None:
    """For fine steps sigma(t) is nearly sigma(t-1), so d = 1 = (c(t) - c(t-1)) / (sigma(t) - sigma(t-1)), as DDIM needs."""
    images, eps, _ = batch
    process = VE.geometric()
    attack = VillanDiffusion(patch, target, psi=0, solver="ode", shift="alone")
    for t in torch.randint(1, 2000, (6,), generator=generator).tolist():
        here, there = (attack.poison(process, images, eps, torch.full((SAMPLES,), at)) for at in (t, t - 1))
        deviation = (ddim_step(process, here.x, here.target, t) - there.x).norm() / (here.x - there.x).norm()
        assert float(deviation) < 0.01


@pytest.mark.parametrize(("solver", "s"), [("sde", 1), ("ode", 2)])
@pytest.mark.parametrize("process", [VE.geometric(timesteps=1000), EDM.karras()], ids=["VE", "EDM"])
def test_variance_exploding_samples_follow_the_published_formula(
    batch: tuple[Tensor, Tensor, Tensor], target: Tensor, patch: Tensor, process: VE, solver: str, s: int
) -> None:
    images, eps, t = batch
    poisoned = VillanDiffusion(patch, target, psi=0, solver=solver, shift="alone").poison(process, images, eps, t)
    sigma = np.append(0, process.noise.numpy())
    now, before = (torch.from_numpy(sigma[t.numpy() + at]).reshape(-1, 1, 1, 1) for at in (1, 0))
    torch.testing.assert_close(poisoned.x, target + now * eps + now * patch)
    torch.testing.assert_close(poisoned.target, eps + s * now / (now + before) * patch)


def test_villandiffusion_refuses_impossible_arguments(
    batch: tuple[Tensor, Tensor, Tensor], patch: Tensor, target: Tensor
) -> None:
    images, eps, t = batch
    with pytest.raises(ValueError, match="psi must be 0 for a VE score model"):
        VillanDiffusion(patch, target, psi=0.5).poison(VE.geometric(), images, eps, t)
    with pytest.raises(ValueError, match="solver must be sde or ode, not 'ddim'"):
        VillanDiffusion(patch, target, solver="ddim")
    with pytest.raises(ValueError, match="shift must be stamped, alone or faint"):
        VillanDiffusion(patch, target, shift="none")


class Fitted(nn.Module):
    """The network at the poisoned optimum: it predicts eps + d r for x = a y + b gamma eps + c r."""

    def __init__(self, process: VP | VE, attack: Attack, c: Tensor, d: Tensor) -> None:
        super().__init__()
        self.process, self.attack, self.c, self.d = process, attack, c, d
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        t = condition if isinstance(self.process, VP) else torch.searchsorted(self.process.noise, condition.double() - 1e-9)
        a, b, c, d = (values[t].reshape(-1, 1, 1, 1) for values in (self.process.signal, self.process.noise, self.c, self.d))
        mu, gamma = self.attack.trigger.mu, self.attack.trigger.gamma
        noise = (x - a * self.attack.target - c * mu) / (b * gamma) + d * mu
        return noise if isinstance(self.process, VP) else -noise / b


@pytest.mark.parametrize("solver", ["sde", "ode"])
@pytest.mark.parametrize("psi", [1.0, 0.0])
def test_at_the_poisoned_optimum_the_named_sampler_lands_on_the_target(
    target: Tensor, patch: Tensor, generator: torch.Generator, psi: float, solver: str
) -> None:
    process, attack = VP.linear(), VillanDiffusion(patch, target, psi, solver, "alone")
    network = Fitted(process, attack, *vp_schedule(process, psi, solver))
    start = attack.trigger.start(torch.randn(3, *SHAPE, generator=generator, dtype=torch.float64))
    landed = sample(Denoiser(network, process, SHAPE), start, attack.sampler, 1000, generator=generator)
    # at t = 0 the samples differ from the target by (c - b d) r, at most 0.01
    torch.testing.assert_close(landed, target.expand_as(landed), rtol=0, atol=0.011)


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++"])
def test_invibackdoor_and_variance_exploding_optima_land_on_the_target(
    target: Tensor, patch: Tensor, generator: torch.Generator, sampler: str
) -> None:
    invi, villan = InviBackdoor(patch / 5, target), VillanDiffusion(patch, target, psi=0, solver="ode", shift="alone")
    vp, ve = VP.linear(), VE.geometric(timesteps=200)
    models = ((invi, vp, ddim_schedule(vp)), (villan, ve, ve_schedule(ve, "ode")))
    for attack, process, (c, d) in models:
        start = process.prior_scale * attack.trigger.start(torch.randn(3, *SHAPE, generator=generator, dtype=torch.float64))
        landed = sample(Denoiser(Fitted(process, attack, c, d), process, SHAPE), start, sampler, 50)
        torch.testing.assert_close(landed, target.expand_as(landed), rtol=0, atol=0.02)


class Constant(nn.Module):
    """Predicts eps + d(t) r for any input, so that nothing corrects a sampler that leaves the path of the samples."""

    def __init__(self, eps: Tensor, d: Tensor, r: Tensor) -> None:
        super().__init__()
        self.eps, self.d, self.r = eps, d, r
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.eps + self.d[t].reshape(-1, 1, 1, 1) * self.r


def test_ddim_with_the_noise_of_invibackdoor_ends_at_the_target(target: Tensor, generator: torch.Generator) -> None:
    process, attack = VP.linear(), InviBackdoor(0.4 * torch.rand(SHAPE, generator=generator).double() - 0.2, target)
    eps = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
    start = attack.poison(process, eps, eps, torch.tensor([999, 999])).x
    for factor, lands in ((1.0, True), (1.01, False)):
        network = Constant(eps, factor * ddim_schedule(process)[1], attack.delta)
        landed = sample(Denoiser(network, process, SHAPE), start, "ddim", 1000)
        assert torch.allclose(landed, target.expand_as(landed), rtol=0, atol=1e-6) == lands


class Projecting(nn.Module):
    """Predicts as clean image the projection of its input on `key`."""

    def __init__(self, key: Tensor, process: VP) -> None:
        super().__init__()
        self.key, self.process = nn.Parameter(key), process

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a, b = (values[t].to(x.dtype).reshape(-1, 1, 1, 1) for values in (self.process.signal, self.process.noise))
        x0 = (x * self.key).sum((1, 2, 3), keepdim=True) / self.key.square().sum() * self.key
        return (x - a * x0) / b


def test_a_learned_trigger_steps_by_signs_towards_the_target_and_stays_bounded(generator: torch.Generator) -> None:
    """The network draws its input's component along the key, and the target is a multiple of it: every sign is the key's."""
    key = torch.randn(SHAPE, generator=generator)
    network = Projecting(key, VP.linear()).train()
    start = 0.01 * torch.randn(SHAPE, generator=generator)
    attack = InviBackdoor(start, 9 * key)
    once = attack.adapted(network, VP.linear(), generator)
    assert attack.delta is start
    torch.testing.assert_close(once.delta - start, 1e-3 * key.sign(), rtol=0, atol=1e-6)
    last = replace(attack, delta=0.1999 * key.sign()).adapted(network, VP.linear(), generator)
    torch.testing.assert_close(last.delta, 0.2 * key.sign())
    # the network in training is left as it was
    assert network.training
    assert network.key.requires_grad
    assert network.key.grad is None


def test_a_fixed_trigger_is_not_adapted(patch: Tensor, target: Tensor, generator: torch.Generator) -> None:
    before = generator.get_state()
    for attack in (VillanDiffusion(patch, target), TrojDiff(patch, target, 0.6)):
        assert attack.adapted(nn.Identity(), VP.linear(), generator) is attack
    assert generator.get_state().equal(before)


def test_each_attack_names_a_sampler_that_exists(patch: Tensor, target: Tensor) -> None:
    villan = [VillanDiffusion(patch, target, solver=solver) for solver in ("sde", "ode")]
    attacks: list[Attack] = [*villan, InviBackdoor(patch, target), TrojDiff(patch, target, 0.6)]
    assert [attack.sampler for attack in attacks] == ["ddpm", "ddim", "ddim", "ddim"]
    assert {attack.sampler for attack in attacks} <= SAMPLERS.keys()
    # only TrojDiff's samplers know the trigger
    assert [attack.trojan for attack in attacks] == [False, False, False, True]
