"""Evidence and the input test against numpy, scipy and the power computed in closed form."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from seal_fast.checkpoints.trigger import Trigger
from seal_fast.noise_triggers import InputDetector, Reversion, model_evidence

SHAPE = (3, 7, 5)


def random_trigger(generator: torch.Generator, shape: tuple[int, int, int] = SHAPE, strength: float = 0.5) -> Trigger:
    mu = strength * torch.randn(shape, generator=generator)
    return Trigger(mu, 0.2 + torch.rand(shape, generator=generator))


def test_evidence_is_the_divergence_from_standard_noise(generator: torch.Generator) -> None:
    trigger = random_trigger(generator)
    evidence = model_evidence(Reversion(trigger, loss=0.25, finite=True, evaluations=8))
    mu, gamma = trigger.mu.numpy().astype(np.float64), trigger.gamma.numpy().astype(np.float64)
    kl = -np.log(gamma) + (gamma**2 + mu**2 - 1) / 2
    assert evidence.M_r == pytest.approx(kl.mean(), rel=1e-5)
    assert evidence.V_r == pytest.approx(((kl - kl.mean()) ** 2).mean(), rel=1e-5)
    assert evidence.mu_norm == pytest.approx(np.linalg.norm(mu), rel=1e-5)
    assert evidence.gamma_mean == pytest.approx(gamma.mean(), rel=1e-5)
    assert evidence.reversed_loss == 0.25


def test_evidence_does_not_depend_on_the_image_size(generator: torch.Generator) -> None:
    small = random_trigger(generator)
    tiled = Trigger(small.mu.repeat(1, 2, 3), small.gamma.repeat(1, 2, 3))
    one, six = (model_evidence(Reversion(trigger, 1.0, True, 1)) for trigger in (small, tiled))
    assert one.M_r is not None
    assert one.V_r is not None
    assert six.M_r == pytest.approx(one.M_r, rel=1e-5)
    assert six.V_r == pytest.approx(one.V_r, rel=1e-5)


def test_a_trigger_without_noise_still_has_finite_evidence(generator: torch.Generator) -> None:
    trigger = Trigger(torch.randn(SHAPE, generator=generator), torch.zeros(SHAPE))
    evidence = model_evidence(Reversion(trigger, 1.0, True, 1))
    assert evidence.M_r is not None
    assert evidence.V_r is not None
    assert evidence.M_r > 1
    assert evidence.gamma_mean == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_evidence_holds_no_value_that_is_not_a_number(value: float) -> None:
    trigger = Trigger(torch.zeros(SHAPE), torch.ones(SHAPE))
    evidence = model_evidence(Reversion(trigger, value, True, 1))
    assert evidence.reversed_loss is None
    assert evidence.M_r == evidence.V_r == evidence.mu_norm == 0


@pytest.mark.parametrize("scale", [1.0, 80.0, 0.3])
def test_log_ratio_is_the_difference_of_scipys_log_densities(generator: torch.Generator, scale: float) -> None:
    triggers = [random_trigger(generator) for _ in range(3)]
    x = scale * torch.randn(11, *SHAPE, generator=generator)
    x[:4] = scale * triggers[1].start(x[:4] / scale)
    found = InputDetector([replace(trigger, prior_scale=scale) for trigger in triggers]).log_ratio(x)
    assert found.shape == (11, 3)
    standard = x.double().numpy() / scale
    for k, trigger in enumerate(triggers):
        mu, gamma = trigger.mu.double().numpy(), trigger.gamma.double().numpy()
        expected = (norm.logpdf(standard, mu, gamma) - norm.logpdf(standard)).sum(axis=(1, 2, 3))
        np.testing.assert_allclose(found[:, k].numpy(), expected, rtol=1e-4, atol=1e-3)


def test_an_input_is_flagged_if_any_trigger_explains_it_better(generator: torch.Generator) -> None:
    triggers = [random_trigger(generator, strength=0.15) for _ in range(3)]
    x = torch.cat([trigger.start(torch.randn(60, *SHAPE, generator=generator)) for trigger in triggers])
    detector = InputDetector(triggers)
    flags = detector(x)
    assert flags.dtype == torch.bool
    alone = torch.stack([InputDetector(trigger)(x) for trigger in triggers], dim=1)
    assert flags.equal(alone.any(1))
    assert not flags.equal(alone[:, 0])


def within(share: Tensor, expected: float) -> None:
    """Five standard errors of a share, never less than five counts."""
    n = len(share)
    error = math.sqrt(expected * (1 - expected) / n)
    assert float(share.double().mean()) == pytest.approx(expected, abs=5 * max(error, 1 / n))


@pytest.mark.parametrize("gamma", [1.0, 0.6])
def test_power_of_a_pure_shift_is_the_closed_form(generator: torch.Generator, gamma: float) -> None:
    """terd.md, section 4: the defender assumes gamma 1 and an inexact mu, the attacker has both."""
    count = 4000
    mu = torch.randn(SHAPE, generator=generator)
    mu *= 2.0 / mu.norm()
    reverted = mu + 0.05 * torch.randn(SHAPE, generator=generator)
    length = float(reverted.norm())
    detector = InputDetector(Trigger.shift(reverted))
    clean = torch.randn(count, *SHAPE, generator=generator)
    attack = Trigger(mu, torch.full(SHAPE, gamma)).start(torch.randn(count, *SHAPE, generator=generator))
    within(~detector(clean), norm.cdf(length / 2))
    within(detector(attack), norm.cdf((float((mu * reverted).sum()) / length - length / 2) / gamma))


def test_power_for_reduced_variance_noise_is_the_gaussian_approximation(generator: torch.Generator) -> None:
    """terd.md, section 4, general gamma: the sum over 3072 dimensions is Gaussian to about a percent."""
    shape, count, g = (3, 32, 32), 2000, 0.97
    mu = 0.01 * torch.randn(shape, generator=generator)
    detector = InputDetector(Trigger(mu, torch.full(shape, g)))
    m = mu.double().numpy()
    quadratic, linear = 0.5 - 1 / (2 * g**2), m / g**2
    offset = -math.log(g) - m**2 / (2 * g**2)
    for start, shift, s in ((None, 0 * m, 1.0), (detector, m, g)):
        mean = (quadratic * (shift**2 + s**2) + linear * shift + offset).sum()
        variance = (2 * quadratic**2 * s**4 + s**2 * (2 * quadratic * shift + linear) ** 2).sum()
        x = torch.randn(count, *shape, generator=generator)
        if start is not None:
            x = g * x + mu
        found = float(detector(x).double().mean())
        expected = norm.cdf(mean / math.sqrt(variance))
        assert 0.01 < expected < 0.99
        assert found == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / count) + 0.01)


def test_prior_scale_only_rescales_inputs(generator: torch.Generator) -> None:
    trigger = random_trigger(generator, strength=0.1)
    x = torch.randn(50, *SHAPE, generator=generator)
    plain = InputDetector(trigger).log_ratio(x)
    scaled = InputDetector(replace(trigger, prior_scale=64.0)).log_ratio(64.0 * x)
    torch.testing.assert_close(scaled, plain)


def test_triggers_that_do_not_fit_together_are_refused(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="at least one trigger"):
        InputDetector([])
    with pytest.raises(ValueError, match="one prior scale"):
        InputDetector([random_trigger(generator), replace(random_trigger(generator), prior_scale=2.0)])
    with pytest.raises(ValueError, match="one shape"):
        InputDetector([random_trigger(generator), random_trigger(generator, (3, 5, 7))])


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 4, 5), (2, 3, 5, 4), (2, 1, 3, 4, 5)])
def test_inputs_of_another_shape_are_refused_with_the_right_one(shape: tuple[int, ...]) -> None:
    detector = InputDetector(Trigger.shift(torch.ones(3, 4, 5)))
    for wrong in (torch.zeros(shape), torch.zeros(2, 3, 4, 5).numpy()):
        with pytest.raises(ValueError, match=r"a tensor \[N, 3, 4, 5\]"):
            detector(wrong)


@pytest.mark.parametrize("value", [1e20, -3e38, 1000.0, math.inf, math.nan])
def test_what_is_no_noise_is_refused_and_not_called_clean(generator: torch.Generator, value: float) -> None:
    trigger = random_trigger(generator, strength=2.0)
    inputs = trigger.start(torch.randn(4, *SHAPE, generator=generator))
    detector = InputDetector(trigger)
    assert detector(inputs).all()
    inputs[2, 1, 3, 3] = value
    with pytest.raises(ValueError, match="no noise"):
        detector(inputs)


@pytest.mark.parametrize(
    "trigger", [Trigger.shift(torch.full(SHAPE, 3e38)), Trigger(torch.zeros(SHAPE), torch.ones(SHAPE), 1e-320)]
)
def test_a_trigger_beyond_the_range_of_numbers_decides_nothing(generator: torch.Generator, trigger: Trigger) -> None:
    with pytest.raises(ValueError, match=r"no noise|no input can be decided"):
        InputDetector(trigger)(torch.randn(4, *SHAPE, generator=generator))
