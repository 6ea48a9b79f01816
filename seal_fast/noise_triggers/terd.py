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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from seal_fast.acceleration import accelerated
from seal_fast.acceleration.cuda_graph import verified_graph
from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import Denoiser, sample
from seal_fast.noise_triggers.reversion import Reversion
from seal_fast.noise_triggers.settings import TerdSettings
from seal_fast.ops import reversed_loss
from seal_fast.training import OnStep, native_bfloat16, quiet

OnIteration = Callable[[int, float], None]

READ_EVERY = 8
"""Iterations after which the losses of a captured stage are read: reading waits for the GPU."""


def initial_mu(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """The published start -U[0, 1] per pixel."""
    return -torch.rand(shape, generator=generator)


@dataclass(frozen=True)
class _Stage:
    """What an iteration of a stage draws and descends.

    Attributes:
        name: as callbacks are told it.
        iterations: how many.
        images: that each puts through the denoiser.
        draw: its random numbers on the CPU, noises [N,C,H,W] and timesteps int64 [N].
        loss_of: the loss of what was drawn, on the denoiser's device.
        momentum: of SGD.
        clip: joint gradient norm of mu and gamma; infinite for none.
    """

    name: str
    iterations: int
    images: int
    draw: Callable[[], list[Tensor]]
    loss_of: Callable[[Sequence[Tensor]], Tensor]
    momentum: float
    clip: float


class _Reverter:
    """The state one reversion carries from step to step."""

    def __init__(self, denoiser: Denoiser, settings: TerdSettings, seed: int) -> None:
        self.autocast = settings.half_precision and native_bfloat16(denoiser.device)
        self.denoiser = accelerated(denoiser, torch.bfloat16 if self.autocast else torch.float32)
        self.settings, self.process = settings, denoiser.process
        # drawn on the CPU so that a seed means the same run on every device
        self.generator = torch.Generator().manual_seed(seed)
        self.mu = initial_mu(denoiser.shape, self.generator).to(denoiser.device).requires_grad_()
        self.gamma = torch.full_like(self.mu, settings.gamma_start).requires_grad_()
        self.loss, self.finite = math.nan, True
        self.evaluations = 0

    @property
    def stages(self) -> tuple[_Stage, _Stage]:
        s = self.settings
        estimation, refinement = s.stages
        return (
            _Stage(*estimation, self.estimation_draws, self.estimation_loss, 0.0, math.inf),
            _Stage(*refinement, self.refinement_draws, self.refinement_loss, s.refinement_momentum, s.refinement_clip),
        )

    def noise(self) -> Tensor:
        return torch.randn(self.settings.batch, *self.denoiser.shape, generator=self.generator)

    def timesteps(self, last: bool) -> Tensor:
        T = self.process.num_timesteps
        width = max(1, round(self.settings.window * T))
        low = T - width if last else 0
        return torch.randint(low, low + width, (self.settings.batch,), generator=self.generator)

    def estimation_draws(self) -> list[Tensor]:
        """What stands in for x0, and timesteps and both noises of a pair in the last window."""
        return [self.noise(), self.timesteps(last=True), self.noise(), self.noise()]

    def refinement_draws(self) -> list[Tensor]:
        """Where the sampler starts, and pairs in the last and in the first window."""
        pairs = ([self.timesteps(last), self.noise(), self.noise()] for last in (True, False))
        return [self.noise(), *(drawn for pair in pairs for drawn in pair)]

    def noised_pair(self, x0: Tensor, draws: Sequence[Tensor], last: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Both noised inputs and their timesteps, stacked to twice the batch, and the difference of their noises."""
        t, first, second = draws
        t = t.repeat(2)
        shift = self.process.prior_scale * self.mu if last else 0.0
        x = self.process.add_noise(x0.repeat(2, 1, 1, 1), self.gamma * torch.cat([first, second]), t) + shift
        return x, t, first - second

    def reversed_loss(self, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """Mean of L over the given pairs, all in one forward pass."""
        x, t, difference = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        first, second = self.denoiser(x, t).unflatten(0, (len(pairs), 2, -1)).unbind(1)
        return reversed_loss(first.flatten(0, 1), second.flatten(0, 1), difference)

    def estimation_loss(self, draws: Sequence[Tensor]) -> Tensor:
        x0, *pair = draws
        return self.reversed_loss([self.noised_pair(x0, pair, last=True)])

    def refinement_loss(self, draws: Sequence[Tensor]) -> Tensor:
        eps, *pairs = draws
        # no clipping: the gradient is zero wherever a clamp acts
        start = self.process.prior_scale * (self.gamma * eps + self.mu)
        x0 = sample(self.denoiser, start, "ddim", self.settings.sampler_steps)
        return self.reversed_loss([self.noised_pair(x0, pairs[:3], last=True), self.noised_pair(x0, pairs[3:], last=False)])

    def descend(self, stage: _Stage, on_iteration: OnIteration, capture: bool) -> None:
        """One stage of SGD with a cosine to 0; keeps the mean loss per dimension of its last tenth. Stops where it diverges."""
        iteration = _Iteration(self, stage, stage.draw())
        run: Callable[[], None] = (capture and verified_graph(iteration, iteration.state)) or iteration
        losses = torch.empty(stage.iterations, device=self.mu.device)
        known: list[float] = []
        for done in range(1, stage.iterations + 1):
            if done > 1:
                iteration.load(stage.draw(), (1 + math.cos(math.pi * (done - 1) / stage.iterations)) / 2)
            run()
            losses[done - 1] = iteration.loss
            self.evaluations += stage.images
            if capture and done % READ_EVERY and done < stage.iterations:
                continue
            for value in losses[len(known) : done].tolist():
                known.append(value / self.mu.numel())
                on_iteration(len(known), known[-1])
                if not math.isfinite(value):
                    self.finite = False
                    return
        tail = [value for number, value in enumerate(known, 1) if number > stage.iterations * 0.9]
        self.loss = sum(tail) / len(tail)

    def result(self) -> Reversion:
        trigger = Trigger(self.mu.detach(), self.gamma.detach())
        finite = self.finite and bool(trigger.mu.isfinite().all()) and bool(trigger.gamma.isfinite().all())
        return Reversion(trigger, self.loss, finite, self.evaluations)


class _Iteration:
    """One step of a stage, on tensors that stay where they are, so that a CUDA graph can hold it."""

    def __init__(self, reverter: _Reverter, stage: _Stage, draws: Sequence[Tensor]) -> None:
        self.reverter, self.stage = reverter, stage
        self.draws = [drawn.to(reverter.mu.device, copy=True) for drawn in draws]
        self.velocities = [torch.zeros_like(variable.detach()) for variable in (reverter.mu, reverter.gamma)]
        self.rate = torch.ones((), device=reverter.mu.device)
        self.loss = torch.zeros((), device=reverter.mu.device)

    @property
    def state(self) -> list[Tensor]:
        """All that a call changes."""
        return [self.reverter.mu, self.reverter.gamma, *self.velocities, self.loss]

    def load(self, draws: Sequence[Tensor], rate: float) -> None:
        """What the next call shall use; `rate` multiplies both learning rates."""
        for mine, drawn in zip(self.draws, draws, strict=True):
            # a copy from ordinary memory would wait for the GPU
            mine.copy_(drawn.pin_memory() if mine.is_cuda else drawn, non_blocking=True)
        self.rate.fill_(rate)

    def __call__(self) -> None:
        s, mu, gamma = self.reverter.settings, self.reverter.mu, self.reverter.gamma
        with torch.autocast(mu.device.type, torch.bfloat16, enabled=self.reverter.autocast):
            loss = self.stage.loss_of(self.draws)
        grads = torch.autograd.grad(loss - s.l1 * mu.abs().sum(), [mu, gamma])
        if math.isfinite(self.stage.clip):
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
            grads = tuple((self.stage.clip / (norm + 1e-6)).clamp(max=1.0) * grad for grad in grads)
        rates = s.learning_rate, s.gamma_learning_rate
        with torch.no_grad():
            for variable, grad, velocity, rate in zip((mu, gamma), grads, self.velocities, rates, strict=True):
                velocity.mul_(self.stage.momentum).add_(grad)
                variable.sub_(rate * self.rate * velocity)
            gamma.clamp_(min=0.0)
            self.loss.copy_(loss)


def descend_reversed_loss(
    denoiser: Denoiser, settings: TerdSettings, *, seed: int = 0, on_step: OnStep = quiet, capture: bool = False
) -> Reversion:
    """Revert a trigger as published; arguments as `seal_fast.noise_triggers.reverse_trigger`.

    With `capture` every iteration is one CUDA graph if that can be had, and callbacks come READ_EVERY iterations at a time.
    """
    reverter = _Reverter(denoiser, settings, seed)
    for stage in reverter.stages:
        if stage.iterations and reverter.finite:
            reverter.descend(stage, partial(_on_iteration, on_step, stage.name, stage.iterations), capture)
    return reverter.result()


def _on_iteration(on_step: OnStep, stage: str, total: int, iteration: int, loss: float) -> None:
    on_step(stage, iteration, total, loss)
