"""TERD's reversion against its loss and its optimiser written out again, on networks whose calls are recorded."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import astuple, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seal_fast.diffusion import VE, VP, Denoiser, NoiseProcess, NoiseSource
from seal_fast.noise_triggers import PRESETS, Reversion, TerdSettings, model_evidence, reverse_trigger
from seal_fast.noise_triggers.terd import initial_mu
from seal_fast.training import native_bfloat16

SHAPE = (3, 5, 4)
STEPS = 40
QUIET = TerdSettings(
    estimation_iterations=1,
    refinement_iterations=0,
    batch=3,
    gamma_start=1.0,
    gamma_learning_rate=0.0,
    refinement_momentum=0.0,
    refinement_clip=1e9,
    l1=0.0,
    window=0.1,
    sampler_steps=4,
    half_precision=False,
)
"""One exact step of mu; each test turns on what it examines."""


class Nonlinear(nn.Module):
    """A small random function of x and t, in the dtype of its weights."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = (t.to(x.dtype) / 100).sin().reshape(-1, 1, 1, 1)
        return self.second((self.first(x) + time).tanh())


class Function(nn.Module):
    """Any function of x and t as a network; a network has parameters, by which its device is known."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.unused = function, nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.function(x, t)


class Recorder(nn.Module):
    """Passes everything to `inner` and remembers what came in."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.autocast: set[bool] = set()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append((x.detach().clone(), t.clone()))
        self.autocast.add(torch.is_autocast_enabled("cpu"))
        return self.inner(x, t)

    @property
    def images(self) -> int:
        return sum(len(x) for x, _ in self.calls)


def constant(value: float = 0.0) -> Function:
    """A constant prediction: the reversed loss has no gradient, so only the L1 term acts."""
    return Function(lambda x, t: 0 * x + value)


def revert(network: nn.Module, settings: TerdSettings, process: NoiseProcess | None = None, seed: int = 0) -> Reversion:
    return reverse_trigger(Denoiser(network, process or VP.linear(STEPS), SHAPE), settings, seed=seed)


def start_of(seed: int) -> Tensor:
    return revert(constant(), replace(QUIET, estimation_iterations=0), seed=seed).trigger.mu


def pair_loss(f1: Tensor, f2: Tensor, eps1: Tensor, eps2: Tensor) -> Tensor:
    """Half the squared norm of the difference of the two residuals, averaged over the pairs."""
    losses = [0.5 * ((eps1[i] - f1[i]) - (eps2[i] - f2[i])).pow(2).sum() for i in range(len(eps1))]
    return torch.stack(losses).mean()


def fresh_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (1,), generator=generator))


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


@pytest.mark.parametrize(("window", "width"), [(0.1, 4), (0.01, 1), (0.5, 20)])
def test_timesteps_fill_both_windows_and_nothing_else(generator: torch.Generator, window: float, width: int) -> None:
    recorder = Recorder(constant())
    settings = replace(QUIET, estimation_iterations=0, refinement_iterations=60, batch=4, sampler_steps=1, window=window)
    revert(recorder, settings, seed=fresh_seed(generator))
    t = torch.stack([at for _, at in recorder.calls[1::2]])
    assert t[:, :4].equal(t[:, 4:8])
    assert t[:, 8:12].equal(t[:, 12:])
    assert t[:, :8].unique().tolist() == list(range(STEPS - width, STEPS))
    assert t[:, 8:].unique().tolist() == list(range(width))


def test_a_seed_fixes_the_result_and_another_changes_it(generator: torch.Generator) -> None:
    network, seed = Nonlinear(generator), fresh_seed(generator)
    settings = replace(QUIET, estimation_iterations=3, refinement_iterations=2, gamma_learning_rate=0.01, l1=1e-3)
    once, again, other = (revert(network, settings, seed=s) for s in (seed, seed, seed + 1))
    assert once.trigger.mu.equal(again.trigger.mu)
    assert once.trigger.gamma.equal(again.trigger.gamma)
    assert (once.loss, once.evaluations) == (again.loss, again.evaluations)
    assert not once.trigger.mu.equal(other.trigger.mu)
    assert not once.trigger.mu.requires_grad
    assert not once.trigger.gamma.requires_grad


def test_global_random_state_is_neither_read_nor_moved(generator: torch.Generator) -> None:
    network, settings = Nonlinear(generator), replace(QUIET, refinement_iterations=1)
    torch.manual_seed(fresh_seed(generator))
    before = torch.get_rng_state()
    once = revert(network, settings)
    assert torch.get_rng_state().equal(before)
    torch.rand(1)
    assert revert(network, settings).trigger.mu.equal(once.trigger.mu)


def test_the_network_is_left_as_it_was(generator: torch.Generator) -> None:
    network = Nonlinear(generator)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    revert(network, replace(QUIET, estimation_iterations=2, refinement_iterations=2))
    for name, parameter in network.named_parameters():
        assert parameter.equal(before[name])
        assert parameter.grad is None
        assert not parameter.requires_grad


def cost(settings: TerdSettings) -> int:
    """Images through the network: pairs, in stage 2 of two windows and from a sampler."""
    first, second = settings.estimation_iterations, settings.refinement_iterations
    return settings.batch * (first * 2 + second * (settings.sampler_steps + 4))


@pytest.mark.parametrize(("first", "second", "batch", "steps"), [(3, 2, 5, 4), (0, 3, 1, 7), (4, 0, 2, 10), (0, 0, 2, 3)])
def test_every_image_through_the_network_is_counted(first: int, second: int, batch: int, steps: int) -> None:
    recorder = Recorder(constant())
    settings = TerdSettings(first, second, batch, sampler_steps=steps)
    assert revert(recorder, settings).evaluations == recorder.images == cost(settings)
    assert sum(stage.iterations * stage.images for stage in settings.stages) == cost(settings)


def test_progress_reports_every_step_and_the_loss_is_that_of_the_last_tenth(generator: torch.Generator) -> None:
    seen: list[tuple[str, int, int, float]] = []
    settings = replace(QUIET, estimation_iterations=4, refinement_iterations=30, sampler_steps=1)
    denoiser = Denoiser(Nonlinear(generator), VP.linear(STEPS), SHAPE)
    found = reverse_trigger(denoiser, settings, seed=fresh_seed(generator), on_step=lambda *step: seen.append(step))
    expected = [(stage.name, i, stage.iterations) for stage in settings.stages for i in range(1, stage.iterations + 1)]
    assert [step[:3] for step in seen] == expected
    tail = [step[3] for step in seen[-3:]]
    assert found.loss == pytest.approx(sum(tail) / 3, rel=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("calls", [0, 2, 5])
def test_divergence_is_reported_and_ends_the_run(value: float, calls: int) -> None:
    recorder = Recorder(Function(lambda x, t: x * (value if len(recorder.calls) > calls else 0.5)))
    # two estimation calls, then a refinement step of three sampling calls and one of the loss
    found = revert(recorder, replace(QUIET, estimation_iterations=2, refinement_iterations=4, sampler_steps=3))
    assert not found.finite
    assert set(astuple(model_evidence(found))) == {None}
    assert found.evaluations == recorder.images
    assert len(recorder.calls) == (1 if calls == 0 else 2 + 4)


def test_an_overflow_of_the_trigger_in_the_very_last_step_is_reported(generator: torch.Generator) -> None:
    settings = replace(QUIET, learning_rate=1e38, l1=1e38)
    found = revert(Nonlinear(generator), settings)
    assert math.isfinite(found.loss)
    assert not found.trigger.mu.isfinite().all()
    assert not found.finite
    assert set(astuple(model_evidence(found))) == {None}


def test_no_iterations_return_the_start(generator: torch.Generator) -> None:
    seed = fresh_seed(generator)
    found = revert(constant(), replace(QUIET, estimation_iterations=0), seed=seed)
    assert found.finite
    assert math.isnan(found.loss)
    evidence = model_evidence(found)
    assert evidence.reversed_loss is None
    assert evidence.mu_norm == pytest.approx(float(found.trigger.mu.norm()), rel=1e-5)


def test_the_start_is_minus_uniform(generator: torch.Generator) -> None:
    mu = initial_mu(NoiseSource(torch.device("cpu"), fresh_seed(generator)), (3, 64, 64))
    assert -1 < float(mu.min()) < -0.99
    assert -0.01 < float(mu.max()) <= 0
    assert float(mu.mean()) == pytest.approx(-0.5, abs=5 / math.sqrt(12 * mu.numel()))
    trigger = revert(constant(), replace(QUIET, estimation_iterations=0, gamma_start=0.3)).trigger
    assert trigger.gamma.equal(torch.full(SHAPE, 0.3))
    assert bool((trigger.mu <= 0).all())


def test_half_precision_is_asked_for_where_the_hardware_has_it(generator: torch.Generator) -> None:
    network = Nonlinear(generator)
    asked, plain = Recorder(network), Recorder(network)
    settings = replace(QUIET, estimation_iterations=3, refinement_iterations=1, learning_rate=0.05)
    half = revert(asked, replace(settings, half_precision=True))
    full = revert(plain, settings)
    assert plain.autocast == {False}
    assert asked.autocast == {native_bfloat16(torch.device("cpu"))}
    assert half.trigger.mu.dtype == torch.float32
    torch.testing.assert_close(half.loss, full.loss, rtol=0.05, atol=0)
    torch.testing.assert_close(half.trigger.mu, full.trigger.mu, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "change",
    [
        {"estimation_iterations": -1},
        {"refinement_iterations": -1},
        {"batch": 0},
        {"sampler_steps": 0},
        {"window": 0.0},
        {"window": -0.1},
        {"window": 0.51},
        {"window": math.nan},
        {"gamma_start": 0.0},
        {"learning_rate": -0.1},
        {"refinement_momentum": 1.0},
        {"refinement_clip": -1.0},
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change)).split("_")[-1]):
        replace(TerdSettings(), **change)


def test_the_published_preset_holds_the_published_values() -> None:
    published = PRESETS["published"]
    assert isinstance(published, TerdSettings)
    assert (published.estimation_iterations, published.refinement_iterations) == (3000, 1000)
    assert (published.batch, published.sampler_steps, published.window) == (16, 10, 0.01)
    assert (published.learning_rate, published.gamma_learning_rate, published.l1) == (0.5, 0.001, 5e-5)
    assert (published.refinement_momentum, published.refinement_clip) == (0.9, 1.0)
