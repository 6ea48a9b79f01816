"""Samplers compared with closed forms: Gaussian data, TrojDiff's published formulas, an oracle, finite differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import EDM, SAMPLERS, VE, VP, Denoiser, NoiseProcess, sample, timestep_grid
from seal_fast.diffusion.process import per_sample

FINE = 1025
MEAN, STD = 0.3, 0.5


def fine_vp() -> VP:
    """Timesteps uniform in log(a / b), so that halving the stride halves the step of every solver."""
    return VP(torch.sigmoid(2 * torch.linspace(9, -3, FINE, dtype=torch.float64)))


PROCESSES: dict[str, Callable[[], NoiseProcess]] = {
    "vp": fine_vp,
    "ve": lambda: VE.geometric(1e-4, 20.0, FINE),
    "edm": lambda: EDM(VE.geometric(1e-4, 20.0, FINE).noise, sigma_data=0.9),
}


class Ideal(nn.Module):
    """The optimal network for data x0 ~ N(MEAN, STD^2), with the input and output of its process."""

    def __init__(self, process: NoiseProcess) -> None:
        super().__init__()
        self.process = process

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        if isinstance(self.process, EDM):
            sigma, data = (4 * per_sample(condition, x)).exp(), self.process.sigma_data
            total = sigma**2 + data**2
            x = x * total.sqrt()
            x0 = (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)
            return (x0 - data**2 / total * x) / (sigma * data / total.sqrt())
        if isinstance(self.process, VE):
            return (MEAN - x) / (STD**2 + per_sample(condition, x) ** 2)
        ab = per_sample(self.process.a(condition) ** 2, x)
        return (1 - ab).sqrt() * (x - ab.sqrt() * MEAN) / (ab * STD**2 + 1 - ab)


def exact(process: NoiseProcess, start: Tensor, t: int) -> Tensor:
    """The solution of the probability flow ODE, which maps quantiles of x_t to those of x0."""
    a, b = float(process.signal[t]), float(process.noise[t])
    return MEAN + (start - a * MEAN) * STD / math.sqrt((a * STD) ** 2 + b**2)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("heun", 2), ("dpm-solver++", 2)])
def test_ode_samplers_converge_with_their_order(name: str, sampler: str, order: int) -> None:
    process = PROCESSES[name]()
    denoiser = Denoiser(Ideal(process), process, (1, 1, 1))
    # errors grow with the distance from the mean
    start = process.prior_scale * (4 * torch.rand(16, 1, 1, 1, dtype=torch.float64) - 2)
    errors = []
    for stride in (16, 8, 4):
        timesteps = list(range(FINE - 1, -1, -stride))
        errors.append(float((sample(denoiser, start, sampler, timesteps) - exact(process, start, FINE - 1)).abs().max()))
    assert errors[-1] < 0.02
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("name", PROCESSES)
def test_ddpm_draws_the_data_distribution(name: str) -> None:
    process = PROCESSES[name]()
    generator = torch.Generator().manual_seed(7)
    n = 20_000
    last = per_sample(torch.tensor([FINE - 1]), torch.empty(1, 1, 1, 1)).long().flatten().expand(n)
    x0, eps = torch.randn(2, n, 1, 1, 1, dtype=torch.float64, generator=generator)
    start = process.add_noise(MEAN + STD * x0, eps, last)
    timesteps = list(range(FINE - 1, -1, -4))
    draws = sample(Denoiser(Ideal(process), process, (1, 1, 1)), start, "ddpm", timesteps, generator=generator)
    # five standard errors, and 2% for 257 steps instead of infinitely many
    assert float(draws.mean()) == pytest.approx(MEAN, abs=5 * STD / math.sqrt(n))
    assert float(draws.var()) == pytest.approx(STD**2, rel=5 * math.sqrt(2 / n) + 0.02)


class Oracle(nn.Module):
    """Knows x0 and the trigger: returns the exact e of x_t = a x0 + b (gamma e + mu)."""

    def __init__(self, process: VP, x0: Tensor, trigger: Trigger) -> None:
        super().__init__()
        self.process, self.x0, self.trigger = process, x0, trigger

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        n = (x - per_sample(self.process.a(t), x) * self.x0) / per_sample(self.process.b(t), x)
        return (n - self.trigger.mu) / self.trigger.gamma


def triggers(shape: tuple[int, int, int]) -> list[Trigger]:
    """A blend (one gamma) and a patch (gamma and mu in a window only)."""
    blend = Trigger(torch.randn(shape, dtype=torch.float64), torch.full(shape, 0.6, dtype=torch.float64))
    mu, gamma = torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
    mu[:, -2:, -2:], gamma[:, -2:, -2:] = 0.9, 0.1
    return [blend, Trigger(mu, gamma)]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("which", [0, 1], ids=["blend", "patch"])
def test_samplers_with_an_oracle_return_the_image(sampler: str, which: int) -> None:
    process, shape = VP.linear(), (2, 5, 3)
    trigger = triggers(shape)[which]
    x0 = torch.rand(4, *shape, dtype=torch.float64) * 2 - 1
    denoiser = Denoiser(Oracle(process, x0, trigger), process, shape)
    noise = trigger.start(torch.randn(4, *shape, dtype=torch.float64))
    start = process.add_noise(x0, noise, torch.full((4,), 900))
    got = sample(denoiser, start, sampler, [900, 500, 250, 30, 0], trigger=trigger)
    torch.testing.assert_close(got, x0, rtol=0, atol=1e-10)


class Smooth(nn.Module):
    """A tiny float64 network, smooth in x and t."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 3, padding=1, dtype=torch.float64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.mix(x) + per_sample(t, x) / 1000)


def trojan_reference(process: VP, network: nn.Module, x: Tensor, timesteps: list[int], trigger: Trigger, eta: float) -> Tensor:
    """TrojDiff's published reverse steps between any timesteps: DDPM (eta = 1, posterior form with k_t) and DDIM (eta = 0)."""
    ab = process.signal**2
    g, mu = trigger.gamma, trigger.mu
    generator = torch.Generator().manual_seed(11)
    for i, t in enumerate(timesteps):
        last = i + 1 == len(timesteps)
        now, before = ab[t], ab.new_ones(()) if last else ab[timesteps[i + 1]]
        e = network(x, torch.full((len(x),), t))
        x0 = (x - (1 - now).sqrt() * (g * e + mu)) / now.sqrt()
        z = torch.zeros_like(x) if last or eta == 0 else torch.randn(x.shape, generator=generator, dtype=x.dtype)
        if eta == 0:
            x = before.sqrt() * x0 + g * (1 - before).sqrt() * e + (1 - before).sqrt() * mu
            continue
        x0 = x0.clamp(-1, 1)
        al = now / before
        beta = 1 - al
        k = (1 - now).sqrt() - al.sqrt() * (1 - before).sqrt()
        coef = (1 - before).sqrt() * beta - (1 - before) * al.sqrt() * k
        mean = (before.sqrt() * beta * x0 + al.sqrt() * (1 - before) * x + coef * mu) / (1 - now)
        x = mean + g * (beta * (1 - before) / (1 - now)).sqrt() * z
    return x


@pytest.mark.parametrize("timesteps", [[999, 640, 333, 40, 0], list(range(25, -1, -1))], ids=["skipped", "consecutive"])
@pytest.mark.parametrize("which", [0, 1], ids=["blend", "patch"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_trojan_samplers_agree_with_trojdiff(sampler: str, which: int, timesteps: list[int]) -> None:
    process, shape = VP.linear(), (3, 4, 5)
    trigger = triggers(shape)[which]
    denoiser = Denoiser(Smooth(3), process, shape)
    start = trigger.start(torch.randn(2, *shape, dtype=torch.float64))
    ancestral = sampler == "ddpm"
    expected = trojan_reference(process, denoiser.network, start, timesteps, trigger, eta=float(ancestral))
    generator = torch.Generator().manual_seed(11)
    got = sample(denoiser, start, sampler, timesteps, trigger=trigger, clip=ancestral, generator=generator)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", PROCESSES)
def test_neutral_trigger_changes_nothing(sampler: str, name: str) -> None:
    process, shape = PROCESSES[name](), (2, 3, 4)
    denoiser = Denoiser(Smooth(2), process, shape)
    start = process.prior_scale * torch.randn(2, *shape, dtype=torch.float64)
    neutral = Trigger.shift(torch.zeros(shape, dtype=torch.float64))
    plain, trojan = (
        sample(denoiser, start, sampler, 6, trigger=trigger, generator=torch.Generator().manual_seed(1))
        for trigger in (None, neutral)
    )
    torch.testing.assert_close(plain, trojan, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_gradients(sampler: str) -> None:
    process, shape = VP.linear(), (1, 2, 3)
    denoiser = Denoiser(Smooth(1), process, shape)
    eps = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    mu = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gamma = (0.5 + torch.rand(shape, dtype=torch.float64)).requires_grad_()

    def trojan(eps: Tensor, mu: Tensor, gamma: Tensor) -> Tensor:
        trigger, generator = Trigger(mu, gamma), torch.Generator().manual_seed(5)
        return sample(denoiser, trigger.start(eps), sampler, [800, 400, 100, 5], trigger=trigger, generator=generator)

    assert torch.autograd.gradcheck(trojan, (eps, mu, gamma))


@given(T=st.integers(2, 400), share=st.floats(0, 1), spacing=st.sampled_from(["linspace", "leading", "quadratic"]))
def test_grids_descend_within_the_process(T: int, share: float, spacing: str) -> None:
    process = VP.linear(T)
    steps = 1 + round(share * (T - 1))
    grid = timestep_grid(process, steps, spacing)
    assert all(high > low for high, low in itertools.pairwise(grid))
    assert grid[0] < T
    assert grid[-1] >= 0
    assert len(grid) <= steps if spacing == "quadratic" else len(grid) == steps
    if spacing == "linspace":
        gaps = {high - low for high, low in itertools.pairwise(grid)}
        assert grid[0] == T - 1
        assert not gaps or max(gaps) - min(gaps) <= 1
    if spacing != "linspace" or steps > 1:
        assert grid[-1] == 0


def test_published_grids() -> None:
    assert timestep_grid(VP.linear(), 10, "quadratic") == [800, 632, 483, 355, 246, 158, 88, 39, 9, 0]
    assert timestep_grid(VP.linear(), 10, "leading") == list(range(900, -1, -100))


# from 6 on, 0.8 T stays below T-1
@given(T=st.integers(6, 60), share=st.floats(0, 1), spacing=st.sampled_from(["linspace", "leading", "quadratic"]))
def test_grids_avoid_a_timestep_without_signal(T: int, share: float, spacing: str) -> None:
    process = VP(torch.linspace(0.9, 0, T), "v_prediction")
    assert timestep_grid(process, 1 + round(share * (T - 2)), spacing)[0] <= T - 2
    with pytest.raises(ValueError, match=f"between 1 and {T - 1}"):
        timestep_grid(process, T, spacing)


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_impossible_step_counts(steps: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 1000"):
        timestep_grid(VP.linear(), steps)


def test_usage_errors() -> None:
    process = VP.linear(10)
    denoiser = Denoiser(Smooth(1), process, (1, 2, 2))
    start = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="dpm-solver"):
        sample(denoiser, start, "euler")
    with pytest.raises(ValueError, match="spacing"):
        timestep_grid(process, 3, "trailing")
    for timesteps in ([], [3, 3], [1, 2], [10, 5], [5, -1]):
        with pytest.raises(ValueError, match=r"descend within 9 \.\. 0"):
            sample(denoiser, start, "ddim", timesteps)
