"""TERD's trigger reversion as published (arXiv 2409.05294): estimation, then refinement.

Two noises with the same x0 and t give two residuals. The shift that the attack adds to the noise target cancels in their
difference, so the loss

    x_i = a(t) x0 + b(t) gamma eps_i + c mu          i = 1, 2
    L(c, t) = 1/2 || (eps_1 - f(x_1, t)) - (eps_2 - f(x_2, t)) ||^2      sum over C,H,W, mean over the batch

is small at the true trigger of any noise-space attack. c is the prior's scale in the last window of timesteps, 0 in the first.

    estimation   min  L(last) - lambda ||mu||_1                       x0 ~ N(0, I)
    refinement   min  (L(last) + L(first)) / 2 - lambda ||mu||_1      x0 = sampler started at gamma eps + mu
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from seal_fast.acceleration import accelerated
from seal_fast.acceleration.cuda_graph import Record, verified_graph
from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import Denoiser, NoiseSource, sample
from seal_fast.ops import reversed_loss
from seal_fast.training import OnStep, Stage, native_bfloat16, quiet

READ_EVERY = 8
"""Iterations after which the losses of a recorded stage are read: reading waits for the GPU."""


@dataclass(frozen=True)
class TerdSettings:
    """Settings of TERD's two stages (arXiv 2409.05294).

    The paper's programs for BadDiffusion and for TrojDiff differ. These settings hold one choice that serves both, since a
    defender does not know the attack: gamma is always searched for. It starts between 0 and 1. At 0 both noised inputs are
    equal and the loss has no gradient in mu; at 1 TrojDiff's trigger is no minimum.

    Attributes:
        estimation_iterations: steps of stage 1.
        refinement_iterations: steps of stage 2.
        batch: pairs of noised inputs per step; the denoiser sees 2 (stage 1) or 4 (stage 2) times as many.
        gamma_start: initial gamma of every pixel.
        learning_rate: learning rate of mu. Both learning rates follow a cosine to 0, restarted for stage 2.
        gamma_learning_rate: learning rate of gamma.
        refinement_momentum: SGD momentum of stage 2 (stage 1 has none).
        refinement_clip: joint gradient norm of mu and gamma in stage 2.
        l1: lambda, weight of the subtracted ||mu||_1 that keeps mu from shrinking to zero.
        window: fraction of the timesteps in the first and in the last window.
        sampler_steps: DDIM steps that draw stage 2's clean images.
        half_precision: run the denoiser under bfloat16 autocast where the hardware has it (published: float16).
        method: name of this kind of reversion; a calibration file names the class of its settings by it.
    """

    features: ClassVar[tuple[str, ...]] = ("M_r", "V_r")
    """Fields of the evidence that decide on a model."""
    estimation_iterations: int = 3000
    refinement_iterations: int = 1000
    batch: int = 16
    gamma_start: float = 0.5
    learning_rate: float = 0.5
    gamma_learning_rate: float = 1e-3
    refinement_momentum: float = 0.9
    refinement_clip: float = 1.0
    l1: float = 5e-5
    window: float = 0.01
    sampler_steps: int = 10
    half_precision: bool = True
    method: str = field(default="published", init=False)

    def __post_init__(self) -> None:
        if self.estimation_iterations < 0 or self.refinement_iterations < 0:
            raise ValueError("iterations must not be negative")
        if self.batch < 1 or self.sampler_steps < 1:
            raise ValueError("batch and sampler_steps must be at least 1")
        if self.gamma_start <= 0:
            raise ValueError("gamma_start must be positive: at 0 the loss has no gradient in mu")
        if min(self.learning_rate, self.gamma_learning_rate, self.l1, self.refinement_clip) < 0:
            raise ValueError("learning rates, l1 and refinement_clip must not be negative")
        if not 0 <= self.refinement_momentum < 1:
            raise ValueError("refinement_momentum must be in [0, 1)")
        if not 0 < self.window <= 0.5:
            raise ValueError(f"window must be in (0, 0.5], not {self.window}")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Course of a reversion."""
        return (
            Stage("estimation", self.estimation_iterations, 2 * self.batch),
            Stage("refinement", self.refinement_iterations, (4 + self.sampler_steps) * self.batch),
        )


@dataclass(frozen=True)
class TerdResult:
    """The end of a descent.

    Attributes:
        trigger: mu and gamma.
        loss: mean reversed loss per dimension over the last tenth of the last stage; NaN if no iteration ran.
        finite: False if the loss or the trigger left the floating-point range.
        evaluations: denoiser evaluations spent, counted in images.
    """

    trigger: Trigger
    loss: float
    finite: bool
    evaluations: int


@dataclass(frozen=True)
class DescentStage:
    """A stage of the descent: what an iteration draws and minimises.

    Attributes:
        progress: its name, its iterations, and the images of each.
        draw: draws its random numbers on the CPU, noises [N,C,H,W] and timesteps int64 [N].
        loss_of: the loss of what was drawn, on the denoiser's device.
        momentum: momentum of SGD.
        clip: joint gradient norm of mu and gamma; infinite for none.
    """

    progress: Stage
    draw: Callable[[], list[Tensor]]
    loss_of: Callable[[Sequence[Tensor]], Tensor]
    momentum: float
    clip: float


def initial_mu(noise_source: NoiseSource, shape: tuple[int, int, int]) -> Tensor:
    """The published start -U[0, 1] per pixel."""
    return -noise_source.uniform(*shape)


class ReversedLossDescent:
    """The state that one reversion carries from step to step.

    Args:
        denoiser: the suspect model.
        settings: settings of both stages.
        seed: seed of the start and of all noise.
    """

    def __init__(self, denoiser: Denoiser, settings: TerdSettings, seed: int) -> None:
        self.autocast = settings.half_precision and native_bfloat16(denoiser.device)
        self.denoiser = accelerated(denoiser, torch.bfloat16 if self.autocast else torch.float32)
        self.settings, self.process = settings, denoiser.process
        self.noise_source = NoiseSource(denoiser.device, seed)
        self.mu = initial_mu(self.noise_source, denoiser.shape).to(denoiser.device).requires_grad_()
        self.gamma = torch.full_like(self.mu, settings.gamma_start).requires_grad_()
        self.loss, self.finite = math.nan, True
        self.evaluations = 0

    @property
    def stages(self) -> tuple[DescentStage, DescentStage]:
        s = self.settings
        estimation, refinement = s.stages
        return (
            DescentStage(estimation, self.estimation_draws, self.estimation_loss, 0.0, math.inf),
            DescentStage(refinement, self.refinement_draws, self.refinement_loss, s.refinement_momentum, s.refinement_clip),
        )

    def noise(self) -> Tensor:
        return self.noise_source.normal(self.settings.batch, *self.denoiser.shape)

    def timesteps(self, last: bool) -> Tensor:
        T = self.process.num_timesteps
        width = max(1, round(self.settings.window * T))
        low = T - width if last else 0
        return self.noise_source.integers(low, low + width, self.settings.batch)

    def estimation_draws(self) -> list[Tensor]:
        """A stand-in for x0, and the timesteps and both noises of pairs in the last window."""
        return [self.noise(), self.timesteps(last=True), self.noise(), self.noise()]

    def refinement_draws(self) -> list[Tensor]:
        """The noise that the sampler starts from, and pairs in the last and in the first window."""
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
        return reversed_loss(first.flatten(0, 1), second.flatten(0, 1), difference).squeeze(0)

    def estimation_loss(self, draws: Sequence[Tensor]) -> Tensor:
        x0, *pair = draws
        return self.reversed_loss([self.noised_pair(x0, pair, last=True)])

    def refinement_loss(self, draws: Sequence[Tensor]) -> Tensor:
        eps, *pairs = draws
        # no clipping: the gradient is zero wherever a clamp acts
        start = self.process.prior_scale * (self.gamma * eps + self.mu)
        x0 = sample(self.denoiser, start, "ddim", self.settings.sampler_steps)
        return self.reversed_loss([self.noised_pair(x0, pairs[:3], last=True), self.noised_pair(x0, pairs[3:], last=False)])

    def descend(self, stage: DescentStage, on_step: OnStep, record: Record | None) -> None:
        """One stage of SGD with a cosine to 0; keeps the mean loss per dimension of its last tenth. Stops if it diverges."""
        name, iterations, images = stage.progress
        iteration = SgdIteration(self, stage, stage.draw())
        run: Callable[[], None] = (record and verified_graph(iteration, iteration.state, record)) or iteration
        losses = torch.empty(iterations, device=self.mu.device)
        known: list[float] = []
        for done in range(1, iterations + 1):
            if done > 1:
                iteration.load(stage.draw(), (1 + math.cos(math.pi * (done - 1) / iterations)) / 2)
            run()
            losses[done - 1] = iteration.loss
            self.evaluations += images
            if record and done % READ_EVERY and done < iterations:
                continue
            for value in losses[len(known) : done].tolist():
                known.append(value / self.mu.numel())
                on_step(name, len(known), iterations, known[-1])
                if not math.isfinite(value):
                    self.finite = False
                    return
        tail = [value for number, value in enumerate(known, 1) if number > iterations * 0.9]
        self.loss = sum(tail) / len(tail)

    def result(self) -> TerdResult:
        trigger = Trigger(self.mu.detach(), self.gamma.detach())
        finite = self.finite and bool(trigger.mu.isfinite().all()) and bool(trigger.gamma.isfinite().all())
        return TerdResult(trigger, self.loss, finite, self.evaluations)


class SgdIteration:
    """One step of a stage, on tensors that stay where they are, so that a CUDA graph can hold it."""

    def __init__(self, descent: ReversedLossDescent, stage: DescentStage, draws: Sequence[Tensor]) -> None:
        self.descent, self.stage = descent, stage
        self.draws = [drawn.to(descent.mu.device, copy=True) for drawn in draws]
        self.velocities = [torch.zeros_like(variable.detach()) for variable in (descent.mu, descent.gamma)]
        self.rate = torch.ones((), device=descent.mu.device)
        self.loss = torch.zeros((), device=descent.mu.device)

    @property
    def state(self) -> list[Tensor]:
        """All that a call changes."""
        return [self.descent.mu, self.descent.gamma, *self.velocities, self.loss]

    def load(self, draws: Sequence[Tensor], rate: float) -> None:
        """Set what the next call uses; `rate` multiplies both learning rates."""
        for mine, drawn in zip(self.draws, draws, strict=True):
            # a copy from pageable memory would wait for the GPU
            mine.copy_(drawn.pin_memory() if mine.is_cuda else drawn, non_blocking=True)
        self.rate.fill_(rate)

    def __call__(self) -> None:
        s, mu, gamma = self.descent.settings, self.descent.mu, self.descent.gamma
        with torch.autocast(mu.device.type, torch.bfloat16, enabled=self.descent.autocast):
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
    denoiser: Denoiser, settings: TerdSettings, *, seed: int = 0, on_step: OnStep = quiet, record: Record | None = None
) -> TerdResult:
    """Search for a trigger as published. The other arguments are those of `seal_fast.noise_triggers.reverse_trigger`.

    With `record` (see `seal_fast.acceleration.cuda_graph`) the iteration of each stage is recorded if it can be, and callbacks
    come READ_EVERY iterations at a time.
    """
    descent = ReversedLossDescent(denoiser, settings, seed)
    for stage in descent.stages:
        if stage.progress.iterations and descent.finite:
            descent.descend(stage, on_step, record)
    return descent.result()
