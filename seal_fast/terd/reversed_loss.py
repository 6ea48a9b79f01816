"""TERD's trigger reversion as published (arXiv 2409.05294): estimation, then refinement.

Two noises with the same x0 and t give two residuals whose difference does not hold the attack's own target shift, so

    x_i = a(t) x0 + b(t) gamma eps_i + c mu          i = 1, 2
    L(c, t) = 1/2 || (eps_1 - f(x_1, t)) - (eps_2 - f(x_2, t)) ||^2      sum over C,H,W, mean over the batch

is small at the true trigger of any noise-space attack. c is the prior's scale in the last window of timesteps, 0 in the first.

    estimation   min  L(last) - lambda ||mu||_1                       x0 ~ N(0, I)
    refinement   min  (L(last) + L(first)) / 2 - lambda ||mu||_1      x0 = sampler started at gamma eps + mu
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from seal_fast.diffusion import Denoiser, Trigger, sample
from seal_fast.ops import reversed_loss
from seal_fast.terd.reversion import Reversion
from seal_fast.terd.settings import ReversionSettings
from seal_fast.training import OnStep, native_bfloat16, quiet

OnIteration = Callable[[int, float], None]


def initial_mu(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """The published start -U[0, 1] per pixel."""
    return -torch.rand(shape, generator=generator)


class _Reverter:
    """The state one reversion carries from step to step."""

    def __init__(self, denoiser: Denoiser, settings: ReversionSettings, seed: int) -> None:
        self.denoiser, self.settings = denoiser, settings
        self.process = denoiser.process
        # drawn on the CPU so that a seed means the same run on every device
        self.generator = torch.Generator().manual_seed(seed)
        self.mu = initial_mu(denoiser.shape, self.generator).to(denoiser.device).requires_grad_()
        self.gamma = torch.full_like(self.mu, settings.gamma_start).requires_grad_()
        self.loss, self.finite = math.nan, True
        self.autocast = settings.half_precision and native_bfloat16(denoiser.device)
        self.evaluations = 0

    def noise(self) -> Tensor:
        shape = (self.settings.batch, *self.denoiser.shape)
        return torch.randn(shape, generator=self.generator).to(self.denoiser.device)

    def timesteps(self, last: bool) -> Tensor:
        T = self.process.num_timesteps
        width = max(1, round(self.settings.window * T))
        low = T - width if last else 0
        return torch.randint(low, low + width, (self.settings.batch,), generator=self.generator).to(self.denoiser.device)

    def noised_pair(self, x0: Tensor, last: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Both noised inputs and their timesteps, stacked to twice the batch, and the difference of their noises."""
        t = self.timesteps(last).repeat(2)
        first, second = self.noise(), self.noise()
        shift = self.process.prior_scale * self.mu if last else 0.0
        x = self.process.add_noise(x0.repeat(2, 1, 1, 1), self.gamma * torch.cat([first, second]), t) + shift
        return x, t, first - second

    def reversed_loss(self, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """Mean of L over the given pairs, all in one forward pass."""
        x, t, difference = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        self.evaluations += len(x)
        first, second = self.denoiser(x, t).unflatten(0, (len(pairs), 2, -1)).unbind(1)
        return reversed_loss(first.flatten(0, 1), second.flatten(0, 1), difference).squeeze(0)

    def estimation_loss(self) -> Tensor:
        return self.reversed_loss([self.noised_pair(self.noise(), last=True)])

    def refinement_loss(self) -> Tensor:
        # no clipping: the gradient is zero wherever a clamp acts
        start = self.process.prior_scale * (self.gamma * self.noise() + self.mu)
        x0 = sample(self.denoiser, start, "ddim", self.settings.sampler_steps)
        self.evaluations += self.settings.sampler_steps * len(x0)
        return self.reversed_loss([self.noised_pair(x0, last=True), self.noised_pair(x0, last=False)])

    def estimate(self, on_iteration: OnIteration) -> None:
        self.descend(self.estimation_loss, self.settings.estimation_iterations, 0.0, None, on_iteration)

    def refine(self, on_iteration: OnIteration) -> None:
        s = self.settings
        self.descend(self.refinement_loss, s.refinement_iterations, s.refinement_momentum, s.refinement_clip, on_iteration)

    def descend(
        self,
        loss_of: Callable[[], Tensor],
        iterations: int,
        momentum: float,
        clip: float | None,
        on_iteration: OnIteration,
    ) -> None:
        """One stage of SGD with a cosine to 0; keeps the mean loss per dimension of its last tenth. Stops where it diverges."""
        s = self.settings
        groups = [{"params": [self.mu], "lr": s.learning_rate}, {"params": [self.gamma], "lr": s.gamma_learning_rate}]
        optimiser = torch.optim.SGD(groups, lr=0.0, momentum=momentum)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, iterations))
        tail: list[float] = []
        for iteration in range(1, iterations + 1):
            with torch.autocast(self.denoiser.device.type, torch.bfloat16, enabled=self.autocast):
                loss = loss_of()
            objective = loss - s.l1 * self.mu.abs().sum()
            self.mu.grad, self.gamma.grad = torch.autograd.grad(objective, [self.mu, self.gamma])
            if clip is not None:
                torch.nn.utils.clip_grad_norm_([self.mu, self.gamma], clip)
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                self.gamma.clamp_(min=0.0)
            value = loss.item() / self.mu.numel()
            on_iteration(iteration, value)
            if not math.isfinite(value):
                self.finite = False
                return
            if iteration > iterations * 0.9:
                tail.append(value)
        if tail:
            self.loss = sum(tail) / len(tail)

    def result(self) -> Reversion:
        trigger = Trigger(self.mu.detach(), self.gamma.detach())
        finite = self.finite and bool(trigger.mu.isfinite().all()) and bool(trigger.gamma.isfinite().all())
        return Reversion(trigger, self.loss, finite, self.evaluations)


def descend_reversed_loss(
    denoiser: Denoiser, settings: ReversionSettings, *, seed: int = 0, on_step: OnStep = quiet
) -> Reversion:
    """Revert a trigger as published; arguments as `seal_fast.terd.reverse_trigger`."""
    reverter = _Reverter(denoiser, settings, seed)
    if settings.estimation_iterations:
        reverter.estimate(partial(_on_iteration, on_step, "estimation", settings.estimation_iterations))
    if settings.refinement_iterations and reverter.finite:
        reverter.refine(partial(_on_iteration, on_step, "refinement", settings.refinement_iterations))
    return reverter.result()


def _on_iteration(on_step: OnStep, stage: str, total: int, iteration: int, loss: float) -> None:
    on_step(stage, iteration, total, loss)
