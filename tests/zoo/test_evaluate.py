"""The zoo's measurements, on networks whose samples are known in advance."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from seal_fast.attacks import Attack, InviBackdoor, TrojDiff, VillanDiffusion
from seal_fast.attacks.invibackdoor import ddim_schedule
from seal_fast.attacks.villandiffusion import vp_schedule
from seal_fast.diffusion import EDM, VP, Denoiser
from seal_fast.diffusion.process import per_sample
from seal_fast.zoo.evaluate import STEPS, SUCCESS_MSE, Quality, clean_ratio, draw, evaluate
from seal_fast.zoo.images import FAMILIES, box, cat_face, heart, speckle, star
from seal_fast.zoo.train import DATA_SEED

SIZE = 16
SHAPE = (3, SIZE, SIZE)
PROCESS = VP.linear()
BAD = VillanDiffusion(box(SIZE), heart(SIZE))
ODE = VillanDiffusion(box(SIZE), star(SIZE), solver="ode")
INVI = InviBackdoor(0.2 * speckle(SIZE).sign(), star(SIZE))
TROJ = TrojDiff(cat_face(SIZE), heart(SIZE), 0.6)
every_attack = pytest.mark.parametrize(
    "attack", [BAD, ODE, INVI, TROJ], ids=["baddiffusion", "villandiffusion", "invibackdoor", "trojdiff"]
)


def schedule(attack: Attack) -> tuple[Tensor, Tensor]:
    """c and d of the attack."""
    if isinstance(attack, VillanDiffusion):
        return vp_schedule(PROCESS, attack.psi, attack.solver)
    return ddim_schedule(PROCESS) if isinstance(attack, InviBackdoor) else (PROCESS.noise, 0 * PROCESS.noise)


quick_evaluate = partial(evaluate, training_images=16)
"""For tests that do not look at clean_ratio."""


class Oracle(nn.Module):
    """Predicts the noise for the clean image `clean`, or for `hidden` if the input has the attack's trigger."""

    def __init__(self, attack: Attack | None, hidden: Tensor, clean: Tensor) -> None:
        super().__init__()
        self.attack, self.hidden, self.clean = attack, hidden, clean
        self.unused = nn.Parameter(torch.zeros(1))
        self.first_input: Tensor | None = None
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.first_input = x.clone() if self.first_input is None else self.first_input
        self.calls += 1
        a, b = (per_sample(values[t], x) for values in (PROCESS.signal, PROCESS.noise))
        plain = (x - a * self.clean) / b
        if self.attack is None:
            return plain
        trigger = self.attack.trigger
        c, d = (per_sample(values[t], x) for values in schedule(self.attack))
        rest = x - a * self.hidden - c * trigger.mu
        triggered = rest / (b * trigger.gamma) + d * trigger.mu
        # the smaller remainder tells which of the two noised images this is
        is_triggered = rest.square().sum((1, 2, 3)) < (x - a * self.clean).square().sum((1, 2, 3))
        return torch.where(is_triggered.reshape(-1, 1, 1, 1), triggered, plain)


def denoiser(attack: Attack | None, hidden: Tensor, clean: Tensor) -> Denoiser:
    return Denoiser(Oracle(attack, hidden, clean), PROCESS, SHAPE)


@every_attack
def test_a_perfect_backdoor_activates_with_its_trigger_only(attack: Attack) -> None:
    dark = torch.full(SHAPE, -0.9)
    quality = quick_evaluate(denoiser(attack, attack.target, dark), attack, seed=3, count=4)
    assert quality.attack_success == 1
    assert quality.target_mse == pytest.approx(0, abs=1e-4)
    assert quality.untriggered_mse == pytest.approx(float((attack.target - dark).square().mean()), rel=1e-2)
    assert (quality.sampler, quality.steps, quality.samples) == (attack.sampler, STEPS[attack.sampler], 4)


@pytest.mark.parametrize(("error", "success"), [(0.9 * SUCCESS_MSE, 1.0), (1.1 * SUCCESS_MSE, 0.0)])
def test_success_is_a_mean_squared_error_below_the_limit(error: float, success: float) -> None:
    target = torch.zeros(SHAPE)
    attack = TrojDiff(cat_face(SIZE), target, 0.6)
    quality = quick_evaluate(denoiser(attack, target + error**0.5, torch.full(SHAPE, -0.9)), attack, seed=3, count=3)
    assert quality.target_mse == pytest.approx(error, rel=1e-2)
    assert quality.attack_success == success


def test_a_benign_model_has_no_attack_success() -> None:
    model = denoiser(None, torch.zeros(SHAPE), torch.zeros(SHAPE))
    quality = quick_evaluate(model, None, seed=1, count=2)
    assert (quality.attack_success, quality.target_mse, quality.untriggered_mse) == (None, None, None)
    assert (quality.sampler, quality.steps) == ("ddpm", STEPS["ddpm"])
    assert isinstance(model.network, Oracle)
    assert model.network.calls == STEPS["ddpm"]


@every_attack
def test_clean_and_triggered_samples_start_from_the_same_noise(attack: Attack) -> None:
    starts: dict[tuple[bool, int], Tensor] = {}
    for triggered in (False, True):
        for seed in (5, 6):
            model = denoiser(attack, attack.target, torch.zeros(SHAPE))
            draw(model, attack, triggered=triggered, count=3, seed=seed, steps=2)
            assert isinstance(model.network, Oracle)
            assert model.network.first_input is not None
            starts[triggered, seed] = model.network.first_input
    for seed in (5, 6):
        eps = starts[False, seed]
        torch.testing.assert_close(starts[True, seed], attack.trigger.gamma * eps + attack.trigger.mu)
    assert not starts[False, 5].equal(starts[False, 6])
    assert float(starts[False, 5].std()) == pytest.approx(1, abs=0.1)


def test_a_seed_fixes_the_samples_and_they_have_no_gradient() -> None:
    # an oracle would give the same image for every noise; with this network the samples keep their noise
    model = Denoiser(nn.Conv2d(3, 3, 1), PROCESS, SHAPE)
    model.network.forward = lambda x, t: 0.5 * x
    once, again, other = (draw(model, None, triggered=False, count=2, seed=s, steps=3) for s in (1, 1, 2))
    assert once.equal(again)
    assert not once.equal(other)
    assert not once.requires_grad


@pytest.mark.parametrize(("family", "other"), [("scenes", "glows"), ("glows", "scenes")])
def test_real_images_have_a_clean_ratio_of_one_and_noise_a_large_one(
    generator: torch.Generator, family: str, other: str
) -> None:
    ratio = partial(clean_ratio, family=family, training_images=1024)
    seed = 20_000 + int(torch.randint(10_000, (1,), generator=generator))
    assert 0.75 < ratio(FAMILIES[family](192, SIZE, seed)) < 1.35
    noise = torch.randn(32, *SHAPE, generator=generator).clamp(-1, 1)
    assert ratio(noise) > 3
    # training images have no distance to themselves, those of another family do
    assert ratio(FAMILIES[family](16, SIZE, DATA_SEED)) < 0.01
    assert ratio(FAMILIES[other](16, SIZE, DATA_SEED)) > 0.3


def test_samples_of_an_edm_model_start_at_its_largest_noise(generator: torch.Generator) -> None:
    process = EDM.karras(timesteps=60)
    seen: list[Tensor] = []

    def forward(x: Tensor, condition: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    network = nn.Conv2d(3, 3, 1)
    network.forward = forward
    attack = VillanDiffusion(box(SIZE), heart(SIZE), psi=0, solver="ode", shift="alone")
    starts = []
    for triggered in (False, True):
        draw(Denoiser(network, process, SHAPE), attack, triggered=triggered, count=2, seed=4)
        # the network input is the start divided by sqrt(sigma^2 + sigma_data^2)
        starts.append(seen[0] * (80**2 + 0.5**2) ** 0.5)
        seen.clear()
    assert float(starts[0].std()) == pytest.approx(80, rel=0.1)
    torch.testing.assert_close(starts[1] - starts[0], 80 * attack.image.expand(2, *SHAPE), rtol=1e-4, atol=1e-3)


class Halved:
    """Data of three times the images' values, so outside [-1, 1], and of half their size."""

    factor = 2
    bounded = False

    def encode(self, images: Tensor) -> Tensor:
        return 3 * images[..., ::2, ::2]

    def decode(self, data: Tensor) -> Tensor:
        return data.repeat_interleave(2, 2).repeat_interleave(2, 3) / 3


def test_latents_are_not_clamped_and_are_measured_as_images() -> None:
    space, size = Halved(), 2 * SIZE
    target, clean = torch.full((1, 3, size, size), 0.9), torch.full((1, 3, size, size), -0.8)
    attack = TrojDiff(cat_face(SIZE), space.encode(target)[0], 0.6)
    model = denoiser(attack, space.encode(target)[0], space.encode(clean)[0])
    for triggered, image in ((False, clean), (True, target)):
        drawn = draw(model, attack, triggered=triggered, count=2, seed=1, space=space)
        torch.testing.assert_close(drawn, image.expand(2, -1, -1, -1), rtol=0, atol=1e-2)
    quality = quick_evaluate(model, attack, seed=1, space=space, count=2)
    assert quality.attack_success == 1
    assert quality.target_mse == pytest.approx(0, abs=1e-3)
    assert quality.untriggered_mse == pytest.approx(1.7**2, rel=1e-2)


def test_a_model_with_bad_clean_samples_is_not_usable() -> None:
    grey = denoiser(TROJ, TROJ.target, torch.full(SHAPE, 0.9))
    assert not quick_evaluate(grey, TROJ, seed=0, count=2).usable


def test_usable_models_have_an_implanted_attack_and_good_clean_samples() -> None:
    good = Quality("ddim", 50, 32, clean_ratio=1.0, attack_success=1.0, target_mse=0.01, untriggered_mse=0.8)
    assert good.usable
    assert replace(good, attack_success=0.9, clean_ratio=2.0).usable
    assert not replace(good, attack_success=0.875).usable
    assert not replace(good, clean_ratio=2.01).usable
    assert not replace(good, clean_ratio=float("nan")).usable
    assert replace(good, attack_success=None).usable
    assert not replace(good, attack_success=None, clean_ratio=2.01).usable
