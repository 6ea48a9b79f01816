"""TERD (Mo et al., ICML 2024, arXiv 2409.05294) as its authors released it: the baseline for speed.

Written from a description of the released programs, not from their source. It keeps their waste on purpose, because seal-fast
is measured against it:

- the weights require gradients, so every backward pass computes and accumulates weight gradients that nothing uses;
- the two inputs of a pair go through the network in two calls, the four of a refinement loss in four;
- the trigger is pickled to disk in every iteration;
- refinement keeps the activations of all ten sampler steps and four loss evaluations;
- input detection holds two dense d x d covariances and looks at one input at a time.

It leaves out what costs no time: the argument parsing, the poisoned data set built for its labels, and the errors of the
detection scripts (undefined `true_gamma`, gamma in place of gamma^2 as covariance, both rates over one count). gamma's learning
rate is constant. Half precision (BadDiffusion program, no loss scaling) is used on CUDA only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import Denoiser, NoiseProcess, timestep_grid
from seal_fast.diffusion.process import per_sample

SAMPLER_STEPS = 10


@dataclass(frozen=True)
class Settings:
    """One of the two released programs.

    Attributes:
        trojan: revert gamma too (from 0) and refine with TrojDiff's DDIM; otherwise gamma = 1, stock DDIM with clipping.
        momentum, clip_norm: of refinement; estimation uses neither.
        half: run in fp16 autocast.
        l1: weight of the subtracted L1 norm of mu, 5e-5 on CIFAR-10 and 5e-4 on CelebA and CelebA-HQ.
        iterations: of estimation; refinement takes a third.
    """

    trojan: bool
    momentum: float
    clip_norm: float
    half: bool
    l1: float = 5e-5
    iterations: int = 3000
    batch: int = 16
    lr: float = 0.5
    gamma_lr: float = 0.001


BADDIFFUSION = Settings(trojan=False, momentum=0.0, clip_norm=0.01, half=True)
TROJDIFF = Settings(trojan=True, momentum=0.9, clip_norm=1.0, half=False)


@contextmanager
def trainable(denoiser: Denoiser) -> Iterator[None]:
    """Weights with gradients, as in the released programs, which never freeze them; frozen again at the end."""
    denoiser.network.requires_grad_(True)
    try:
        yield
    finally:
        denoiser.network.requires_grad_(False)
        denoiser.network.zero_grad(set_to_none=True)


def reversed_loss(denoiser: Denoiser, x0: Tensor, t: Tensor, mu: Tensor, gamma: Tensor, c: float) -> Tensor:
    """1/2 ||(eps_1 - f(x_1, t)) - (eps_2 - f(x_2, t))||^2 with x_i = a x0 + b gamma eps_i + c mu; mean over samples, scalar."""
    a, b = per_sample(denoiser.process.a(t), x0), per_sample(denoiser.process.b(t), x0)
    eps1, eps2 = torch.randn_like(x0), torch.randn_like(x0)
    residual1 = eps1 - denoiser(a * x0 + b * gamma * eps1 + c * mu, t)
    residual2 = eps2 - denoiser(a * x0 + b * gamma * eps2 + c * mu, t)
    return (residual1 - residual2).square().flatten(1).sum(1).mean() / 2


def window(process: NoiseProcess, n: int, last: bool, device: torch.device) -> Tensor:
    """n timesteps, int64, uniform in the last or the first hundredth of the process."""
    T = process.num_timesteps
    width = max(1, T // 100)
    return torch.randint(T - width if last else 0, T if last else width, (n,), device=device)


def generate(denoiser: Denoiser, start: Tensor, mu: Tensor, gamma: Tensor, trojan: bool) -> Tensor:
    """Ten deterministic DDIM steps from `start` [N,C,H,W], all of them in the graph.

    Stock: x0 clamped and the noise left as predicted, t = 900 .. 0. Trojan: noise gamma e + mu, no clamp, quadratic grid.
    """
    process, x = denoiser.process, start
    grid = timestep_grid(process, SAMPLER_STEPS, "quadratic" if trojan else "leading")
    levels = [(t, float(process.signal[t]), float(process.noise[t])) for t in grid] + [(-1, 1.0, 0.0)]
    for (t, a, b), (_, a_next, b_next) in pairwise(levels):
        n = denoiser(x, torch.full((len(x),), t, device=x.device))
        if trojan:
            n = gamma * n + mu
        x0 = (x - b * n) / a
        x = a_next * (x0 if trojan else x0.clamp(-1, 1)) + b_next * n
    return x


class Reversion:
    """The optimisation variables, optimisers and file of one stage. `step(loss)` ends every iteration."""

    def __init__(
        self, trigger: Trigger, settings: Settings, iterations: int, refining: bool, path: str | os.PathLike[str]
    ) -> None:
        self.settings, self.refining, self.path = settings, refining, path
        self.mu = trigger.mu.clone().requires_grad_()
        self.gamma = trigger.gamma.clone().requires_grad_(settings.trojan)
        momentum = settings.momentum if refining else 0.0
        self.optimizers = [torch.optim.SGD([self.mu], settings.lr, momentum)]
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizers[0], iterations)
        if settings.trojan:
            self.optimizers.append(torch.optim.SGD([self.gamma], settings.gamma_lr, momentum))

    @property
    def trigger(self) -> Trigger:
        return Trigger(self.mu.detach(), self.gamma.detach())

    def step(self, loss: Tensor) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        (loss - self.settings.l1 * self.mu.abs().sum()).backward()
        if self.refining:
            variables = [v for v in (self.mu, self.gamma) if v.requires_grad]
            torch.nn.utils.clip_grad_norm_(variables, self.settings.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            self.gamma.clamp_(min=0)
        torch.save({"mu": self.mu.detach().cpu(), "gamma": self.gamma.detach().cpu()}, self.path)


def initial_trigger(denoiser: Denoiser, settings: Settings) -> Trigger:
    """mu = -U[0, 1] per pixel; gamma = 0 if it is to be searched for, else 1."""
    mu = -torch.rand(denoiser.shape, device=denoiser.device)
    return Trigger(mu, torch.zeros_like(mu) if settings.trojan else torch.ones_like(mu))


def estimate(
    denoiser: Denoiser, trigger: Trigger, settings: Settings, iterations: int, path: str | os.PathLike[str]
) -> Trigger:
    """Stage 1: reversed loss in the last window, standard normal noise in place of x0."""
    state = Reversion(trigger, settings, iterations, False, path)
    device = denoiser.device
    with trainable(denoiser):
        for _ in range(iterations):
            with torch.autocast(device.type, torch.float16, enabled=settings.half and device.type == "cuda"):
                x0 = torch.randn(settings.batch, *denoiser.shape, device=device)
                t = window(denoiser.process, settings.batch, True, device)
                loss = reversed_loss(denoiser, x0, t, state.mu, state.gamma, c=1.0)
            state.step(loss)
    return state.trigger


def refine(denoiser: Denoiser, trigger: Trigger, settings: Settings, iterations: int, path: str | os.PathLike[str]) -> Trigger:
    """Stage 2: x0 generated from the trigger; mean of the reversed losses in the last (c = 1) and first (c = 0) window."""
    state = Reversion(trigger, settings, iterations, True, path)
    device, process = denoiser.device, denoiser.process
    with trainable(denoiser):
        for _ in range(iterations):
            with torch.autocast(device.type, torch.float16, enabled=settings.half and device.type == "cuda"):
                eps = torch.randn(settings.batch, *denoiser.shape, device=device)
                x0 = generate(denoiser, state.gamma * eps + state.mu, state.mu, state.gamma, settings.trojan)
                late, early = (window(process, settings.batch, last, device) for last in (True, False))
                loss = reversed_loss(denoiser, x0, late, state.mu, state.gamma, c=1.0) / 2
                loss = loss + reversed_loss(denoiser, x0, early, state.mu, state.gamma, c=0.0) / 2
            state.step(loss)
    return state.trigger


def reverse_trigger(denoiser: Denoiser, settings: Settings, path: str | os.PathLike[str]) -> Trigger:
    """Both stages at their published length; `path` receives the pickled trigger in every iteration."""
    trigger = estimate(denoiser, initial_trigger(denoiser, settings), settings, settings.iterations, path)
    return refine(denoiser, trigger, settings, settings.iterations // 3, path)


class DenseInputDetector:
    """log N(x; mu, diag(gamma^2)) - log N(x; 0, I) from two d x d covariances, one input at a time; flagged when > 0.

    Args:
        trigger: with gamma > 0.
    """

    def __init__(self, trigger: Trigger) -> None:
        mu, gamma = trigger.mu.flatten(), trigger.gamma.flatten()
        self.backdoor = MultivariateNormal(mu, torch.diag(gamma.square()))
        self.clean = MultivariateNormal(torch.zeros_like(mu), torch.eye(len(mu), dtype=mu.dtype, device=mu.device))

    def log_ratio(self, x: Tensor) -> float:
        """The log density ratio of one input [C,H,W]."""
        flat = x.flatten()
        return float(self.backdoor.log_prob(flat) - self.clean.log_prob(flat))

    def __call__(self, inputs: Tensor) -> list[bool]:
        """Which of the inputs [N,C,H,W] are triggered."""
        return [self.log_ratio(x) > 0 for x in inputs]
