"""The published baseline computes what the paper says: a baseline with wrong mathematics would be no baseline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from scipy.stats import multivariate_normal
from torch import Tensor, nn

from benchmarks.published import terd
from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import VP, Denoiser, sample, timestep_grid
from seal_fast.diffusion.process import per_sample

SHAPE = (2, 3, 5)


class Leaky(nn.Module):
    """f(x, t) = w x + t / 1000: the smallest network whose reversed loss has a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.w * x + per_sample(t, x) / 1000


@pytest.fixture
def denoiser() -> Denoiser:
    return Denoiser(Leaky(), VP.linear(), SHAPE)


def test_reversed_loss_matches_its_expectation(denoiser: Denoiser) -> None:
    """With f linear, x0, t and mu cancel: L = 1/2 sum_i (1 - w b gamma_i)^2 E (eps1 - eps2)^2 = sum_i (1 - w b gamma_i)^2."""
    n, b = 40_000, float(denoiser.process.noise[300])
    x0, t = torch.randn(n, *SHAPE, dtype=torch.float64), torch.full((n,), 300)
    mu, gamma = torch.randn(SHAPE, dtype=torch.float64), torch.rand(SHAPE, dtype=torch.float64)
    loss = terd.reversed_loss(denoiser, x0, t, mu, gamma, c=1.0)
    assert float(loss) == pytest.approx(float((1 - 0.4 * b * gamma).square().sum()), rel=0.02)


def test_reversed_loss_feeds_the_trigger_into_the_network() -> None:
    """A network that depends on the trigger only through x: its four inputs must be a x0 + b gamma eps + c mu."""
    seen: list[Tensor] = []
    denoiser = Denoiser(Leaky(), VP.linear(), SHAPE)
    denoiser.network.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    x0, mu = torch.randn(2, *SHAPE, dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64)
    gamma, t = torch.rand(SHAPE, dtype=torch.float64), torch.tensor([4, 995])
    torch.manual_seed(1)
    terd.reversed_loss(denoiser, x0, t, mu, gamma, c=0.5)
    torch.manual_seed(1)
    for x in seen:
        expected = denoiser.process.add_noise(x0, gamma * torch.randn_like(x0), t) + 0.5 * mu
        torch.testing.assert_close(x, expected)
    assert len(seen) == 2


def test_stock_generation_is_diffusers_ddim(denoiser: Denoiser) -> None:
    scheduler = DDIMScheduler(clip_sample=True)
    scheduler.set_timesteps(10)
    start = x = 2 * torch.randn(3, *SHAPE, dtype=torch.float64)
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser.network(x, t.expand(3)), t, x, return_dict=False)[0]
    got = terd.generate(denoiser, start, torch.zeros(SHAPE), torch.ones(SHAPE), trojan=False)
    torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)


def test_trojan_generation_is_the_trojan_sampler(denoiser: Denoiser) -> None:
    trigger = Trigger(torch.randn(SHAPE, dtype=torch.float64), torch.rand(SHAPE, dtype=torch.float64))
    start = trigger.start(torch.randn(3, *SHAPE, dtype=torch.float64))
    expected = sample(denoiser, start, "ddim", timestep_grid(denoiser.process, 10, "quadratic"), trigger=trigger)
    torch.testing.assert_close(terd.generate(denoiser, start, trigger.mu, trigger.gamma, trojan=True), expected)


@pytest.mark.parametrize("settings", [terd.BADDIFFUSION, terd.TROJDIFF], ids=["baddiffusion", "trojdiff"])
def test_both_stages_run_at_the_published_cost(settings: terd.Settings, tmp_path: Path) -> None:
    network = Leaky().float()
    denoiser = Denoiser(network, VP.linear(), SHAPE)
    path = tmp_path / "reverse.pkl"
    settings = replace(settings, iterations=6, batch=4)
    trigger = terd.reverse_trigger(denoiser, settings, path)

    assert network.calls == 6 * 2 + 2 * (10 + 4)
    assert torch.equal(torch.load(path, weights_only=True)["mu"], trigger.mu)
    assert trigger.mu.isfinite().all()
    assert (trigger.gamma >= 0).all()
    assert torch.equal(trigger.gamma, torch.ones(SHAPE)) != settings.trojan
    assert network.w.grad is None
    assert not network.w.requires_grad, "the denoiser is left frozen"


def test_weight_gradients_are_computed(denoiser: Denoiser) -> None:
    """The waste that the baseline exists to show."""
    mu = torch.zeros(SHAPE, dtype=torch.float64, requires_grad=True)
    x0 = torch.randn(2, *SHAPE, dtype=torch.float64)
    with terd.trainable(denoiser):
        terd.reversed_loss(denoiser, x0, torch.tensor([1, 2]), mu, torch.ones_like(mu), 1.0).backward()
        assert all(p.grad is not None for p in denoiser.network.parameters())


def test_estimation_grows_mu_by_the_l1_term_alone_while_gamma_is_zero(denoiser: Denoiser, tmp_path: Path) -> None:
    """At gamma = 0 both inputs of a pair are equal, so mu moves only by lr * l1 * sum(cosine)."""
    settings = replace(terd.TROJDIFF, gamma_lr=0.0)
    start = terd.initial_trigger(denoiser, settings)
    trigger = terd.estimate(denoiser, start, settings, 8, tmp_path / "reverse.pkl")
    travelled = 0.5 * 5e-5 * sum((1 + np.cos(np.pi * k / 8)) / 2 for k in range(8))
    torch.testing.assert_close(trigger.mu, start.mu + start.mu.sign() * travelled, rtol=0, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_refinement_steps_are_clipped(denoiser: Denoiser, tmp_path: Path, momentum: float) -> None:
    """The linear network leaves only the L1 gradient, here far above the clip: every gradient has the norm clip_norm."""
    settings = replace(terd.BADDIFFUSION, momentum=momentum, l1=1.0)
    start = terd.initial_trigger(denoiser, settings)
    trigger = terd.refine(denoiser, start, settings, 5, tmp_path / "reverse.pkl")
    travelled = velocity = 0.0
    for k in range(5):
        velocity = momentum * velocity + 0.01
        travelled += 0.5 * (1 + np.cos(np.pi * k / 5)) / 2 * velocity
    expected = start.mu + start.mu.sign() / start.mu.numel() ** 0.5 * travelled
    torch.testing.assert_close(trigger.mu, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("last", "expected"), [(True, set(range(990, 1000))), (False, set(range(10)))])
def test_windows(last: bool, expected: set[int]) -> None:
    assert set(terd.window(VP.linear(), 2000, last, torch.device("cpu")).tolist()) == expected


def test_dense_log_ratio_is_scipys() -> None:
    rng = np.random.default_rng()
    mu, gamma, x = rng.normal(size=SHAPE), rng.uniform(0.3, 2.0, SHAPE), rng.normal(size=(5, *SHAPE))
    detector = terd.DenseInputDetector(Trigger(torch.from_numpy(mu), torch.from_numpy(gamma)))
    backdoor = multivariate_normal(mu.ravel(), np.diag(gamma.ravel() ** 2))
    clean = multivariate_normal(np.zeros(mu.size), np.eye(mu.size))
    expected = [backdoor.logpdf(one.ravel()) - clean.logpdf(one.ravel()) for one in x]
    got = [detector.log_ratio(torch.from_numpy(one)) for one in x]
    assert got == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert detector(torch.from_numpy(x)) == [value > 0 for value in expected]
