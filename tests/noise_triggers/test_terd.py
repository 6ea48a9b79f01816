"""TERD's reversion against its loss and its optimiser written out again, on networks whose calls are recorded."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from seal_fast.diffusion import VE, VP, NoiseProcess
from tests.noise_triggers.recorded_networks import (
    QUIET,
    SHAPE,
    STEPS,
    Function,
    Nonlinear,
    Recorder,
    constant,
    fresh_seed,
    pair_loss,
    revert,
    start_of,
)

# no signal in the last timestep: x = gamma eps + mu there, so the recorded inputs give the noises away
PURE_NOISE = VP(torch.cat([torch.linspace(0.99, 0.5, STEPS - 1, dtype=torch.float64), torch.tensor([1e-16]).double()]))
STEP = replace(QUIET, window=1 / STEPS, gamma_start=0.7, learning_rate=0.37, gamma_learning_rate=0.011, l1=0.02)


def written_out_step(network: nn.Module, call: tuple[Tensor, Tensor], start: Tensor) -> tuple[float, Tensor, Tensor]:
    """Loss per dimension, mu and gamma after one step of STEP from `start`, in float64 from the recorded inputs."""
    x, t = call
    assert t.unique().tolist() == [STEPS - 1]
    mu = start.double().requires_grad_()
    gamma = torch.full(SHAPE, 0.7, dtype=torch.float64, requires_grad=True)
    eps1, eps2 = ((x.double() - mu.detach()) / 0.7).chunk(2)
    f = copy.deepcopy(network).double()
    loss = pair_loss(f(gamma * eps1 + mu, t[:3]), f(gamma * eps2 + mu, t[3:]), eps1, eps2)
    of_mu, of_gamma = torch.autograd.grad(loss - 0.02 * mu.abs().sum(), [mu, gamma])
    assert (0.37 * of_mu).abs().max() > 1e-3
    assert (0.011 * of_gamma).abs().max() > 1e-3
    return loss.item() / math.prod(SHAPE), mu.detach() - 0.37 * of_mu, gamma.detach() - 0.011 * of_gamma


def test_one_estimation_step_is_the_gradient_of_the_written_out_loss(generator: torch.Generator) -> None:
    network, seed = Nonlinear(generator), fresh_seed(generator)
    recorder = Recorder(network)
    found = revert(recorder, STEP, PURE_NOISE, seed)
    (call,) = recorder.calls
    loss, mu, gamma = written_out_step(network, call, start_of(seed))
    assert found.loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(found.trigger.mu.double(), mu, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.trigger.gamma.double(), gamma, rtol=0, atol=1e-5)


def written_out_ddim(f: nn.Module, ab: Tensor, grid: list[int], x: Tensor) -> Tensor:
    """Song et al. 2021, equation 12 with sigma = 0, without any clamp."""
    for t, s in pairwise([*grid, -1]):
        eps = f(x, torch.full((len(x),), t))
        before = ab[s] if s >= 0 else torch.ones(())
        x = before.sqrt() * (x - (1 - ab[t]).sqrt() * eps) / ab[t].sqrt() + (1 - before).sqrt() * eps
    return x


def test_one_refinement_step_is_the_gradient_through_the_sampler(generator: torch.Generator) -> None:
    process, network, seed = VP.linear(STEPS, beta_end=0.2), Nonlinear(generator), fresh_seed(generator)
    recorder = Recorder(network)
    settings = replace(QUIET, estimation_iterations=0, refinement_iterations=1, learning_rate=0.21, l1=0.03)
    found = revert(recorder, settings, process, seed)

    *drawing, (x, t) = recorder.calls
    grid = [int(at[0]) for _, at in drawing]
    assert grid[0] == STEPS - 1
    assert grid[-1] == 0
    assert len(grid) == settings.sampler_steps
    assert {len(images) for images, _ in drawing} == {3}

    f, ab = network.double(), process.signal**2
    start = start_of(seed).double()
    mu = start.clone().requires_grad_()
    moved = mu - start
    begun = drawing[0][0].double()
    with torch.no_grad():
        recorded_x0 = written_out_ddim(f, ab, grid, begun)
    x0 = written_out_ddim(f, ab, grid, begun + moved)
    loss = torch.zeros((), dtype=torch.float64)
    for items, last in ((range(6), True), (range(6, 12), False)):
        at = t[list(items)]
        assert at[:3].equal(at[3:])
        assert bool((at >= STEPS - 4).all() if last else (at < 4).all())
        a, b = (v.reshape(-1, 1, 1, 1) for v in (ab[at].sqrt(), (1 - ab[at]).sqrt()))
        seen = x[list(items)].double()
        eps = (seen - a * recorded_x0.repeat(2, 1, 1, 1) - (start if last else 0)) / b
        value = f(a * x0.repeat(2, 1, 1, 1) + b * eps + (mu if last else 0), at)
        loss = loss + pair_loss(value[:3], value[3:], eps[:3], eps[3:]) / 2
    (gradient,) = torch.autograd.grad(loss - 0.03 * mu.abs().sum(), [mu])

    assert found.loss == pytest.approx(loss.item() / math.prod(SHAPE), rel=1e-4)
    torch.testing.assert_close(found.trigger.mu.double(), start - 0.21 * gradient, rtol=0, atol=1e-4)
    assert (0.21 * gradient).abs().max() > 1e-2


def test_estimation_does_not_see_what_the_network_adds_everywhere(generator: torch.Generator) -> None:
    # the attack's own d(t) mu is such a term: TERD needs no knowledge of it
    network, seed = Nonlinear(generator), fresh_seed(generator)
    pattern = 5 * torch.randn(SHAPE, generator=generator)
    shifted = Function(lambda x, t: network(x, t) + (t / STEPS).square().reshape(-1, 1, 1, 1) * pattern)
    settings = replace(QUIET, estimation_iterations=6, learning_rate=0.1, gamma_learning_rate=0.01)
    plain, other = revert(network, settings, seed=seed), revert(shifted, settings, seed=seed)
    torch.testing.assert_close(other.trigger.mu, plain.trigger.mu, rtol=0, atol=1e-4)
    torch.testing.assert_close(other.trigger.gamma, plain.trigger.gamma, rtol=0, atol=1e-4)
    assert (plain.trigger.mu - start_of(seed)).abs().max() > 1e-2


@pytest.mark.parametrize("iterations", [1, 2, 7, 30])
def test_without_a_gradient_the_l1_term_carries_mu_by_the_summed_cosine(generator: torch.Generator, iterations: int) -> None:
    # sum over k < n of (1 + cos(pi k / n)) / 2 is (n + 1) / 2; any momentum in stage 1 would go further
    seed = fresh_seed(generator)
    settings = replace(QUIET, estimation_iterations=iterations, learning_rate=0.4, l1=0.01, refinement_momentum=0.9)
    found = revert(constant(3.0), settings, seed=seed)
    farther = found.trigger.mu.abs() - start_of(seed).abs()
    torch.testing.assert_close(farther, torch.full(SHAPE, 0.01 * 0.4 * (iterations + 1) / 2), rtol=0, atol=1e-6)
    assert found.trigger.gamma.equal(torch.ones(SHAPE))


def test_refinement_restarts_the_cosine_and_has_momentum_and_a_clip(generator: torch.Generator) -> None:
    seed, first, second, momentum, clip, rate = fresh_seed(generator), 5, 4, 0.7, 0.02, 0.3
    settings = replace(
        QUIET,
        estimation_iterations=first,
        refinement_iterations=second,
        learning_rate=rate,
        refinement_momentum=momentum,
        refinement_clip=clip,
        l1=0.05,
    )
    per_pixel = clip / math.sqrt(math.prod(SHAPE))
    assert per_pixel < 0.05
    expected, velocity = 0.05 * rate * (first + 1) / 2, 0.0
    for k in range(second):
        velocity = momentum * velocity + per_pixel
        expected += velocity * rate * (1 + math.cos(math.pi * k / second)) / 2
    farther = revert(constant(), settings, seed=seed).trigger.mu.abs() - start_of(seed).abs()
    torch.testing.assert_close(farther, torch.full(SHAPE, expected), rtol=1e-4, atol=1e-6)


def test_one_clipped_refinement_step_moves_mu_and_gamma_by_the_rate_times_the_clip(generator: torch.Generator) -> None:
    seed, rate, clip = fresh_seed(generator), 0.5, 0.03
    settings = replace(
        QUIET,
        estimation_iterations=0,
        refinement_iterations=1,
        learning_rate=rate,
        gamma_learning_rate=rate,
        refinement_clip=clip,
    )
    trigger = revert(Nonlinear(generator), settings, seed=seed).trigger
    steps = torch.cat([trigger.mu - start_of(seed), trigger.gamma - 1]).norm()
    assert float(steps) == pytest.approx(rate * clip, rel=1e-3)
    assert not trigger.gamma.equal(torch.ones(SHAPE))


def test_a_trojdiff_like_network_yields_its_gamma_and_leaves_mu(generator: torch.Generator) -> None:
    # f = (x - m) / g: the loss is half of (1 - b gamma / g)^2 |eps_1 - eps_2|^2, with nothing of mu in it
    g = 0.5 + 0.5 * torch.rand(SHAPE, generator=generator)
    m = torch.randn(SHAPE, generator=generator)
    seed = fresh_seed(generator)
    process = VP.linear(STEPS, beta_end=0.6)
    settings = replace(QUIET, estimation_iterations=250, batch=16, learning_rate=0.5, gamma_learning_rate=0.05)
    found = revert(Function(lambda x, t: (x - m) / g), settings, process, seed)
    torch.testing.assert_close(found.trigger.gamma, g, rtol=0, atol=2e-3)
    torch.testing.assert_close(found.trigger.mu, start_of(seed), rtol=0, atol=1e-4)
    assert found.loss < 1e-4


def test_gamma_never_turns_negative(generator: torch.Generator) -> None:
    # f = -10 x punishes all noise, and the rate is far too large
    settings = replace(QUIET, estimation_iterations=3, learning_rate=0.0, gamma_learning_rate=100.0)
    gammas: list[Tensor] = []
    for iterations in range(1, 4):
        found = revert(
            Function(lambda x, t: -10 * x), replace(settings, estimation_iterations=iterations), seed=fresh_seed(generator)
        )
        gammas.append(found.trigger.gamma)
    assert all(bool((gamma >= 0).all()) for gamma in gammas)
    assert any(bool((gamma == 0).any()) for gamma in gammas)


@pytest.mark.parametrize("process", [VP.linear(STEPS), VE.geometric(0.01, 60.0, STEPS)], ids=["vp", "ve"])
def test_mu_enters_on_the_scale_of_the_prior_and_only_where_it_belongs(
    generator: torch.Generator, process: NoiseProcess
) -> None:
    """Two runs with the same noises and different mu: every input the network sees differs by what mu adds to it."""
    seed, rate = fresh_seed(generator), 0.5
    seen: list[list[tuple[Tensor, Tensor]]] = []
    for l1 in (0.0, 1.0):
        recorder = Recorder(constant())
        settings = replace(QUIET, estimation_iterations=2, refinement_iterations=1, sampler_steps=2, learning_rate=rate, l1=l1)
        revert(recorder, settings, process, seed)
        seen.append(recorder.calls)
    still, moving = seen
    scale = float(process.noise[-1]) if isinstance(process, VE) else 1.0
    after_one, after_two = -rate, -rate * 1.5

    def difference(call: int) -> Tensor:
        return moving[call][0] - still[call][0]

    def check(value: Tensor, expected: Tensor | float) -> None:
        torch.testing.assert_close(value, torch.as_tensor(expected).to(value).expand_as(value), rtol=0, atol=2e-4 * scale)

    check(difference(0), 0.0)
    check(difference(1), scale * after_one)
    check(difference(2), scale * after_two)
    # a network that predicts no noise leaves the sampler only to undo the signal's decay
    x0 = scale * after_two / float(process.signal[-1])
    conditions = moving[4][1]
    if isinstance(process, VE):
        t = torch.tensor([int((process.noise - float(sigma)).abs().argmin()) for sigma in conditions])
    else:
        t = conditions
    last, first = difference(4)[:6], difference(4)[6:]
    a = process.signal[t].reshape(-1, 1, 1, 1)
    assert bool((t[:6] >= STEPS - 4).all())
    assert bool((t[6:] < 4).all())
    check(last, a[:6] * x0 + scale * after_two)
    check(first, a[6:] * x0)
