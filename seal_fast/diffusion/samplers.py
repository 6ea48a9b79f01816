"""Samplers, written once for every noise process and differentiable in the start and in the trigger.

A step goes from timestep t to s < t (or to the clean image: a = 1, b = 0). With e the predicted noise and a trigger
(mu, gamma), TrojDiff (Chen et al., CVPR 2023) shows that the reverse process of

    x_t = a x0 + b (gamma eps + mu)

is the ordinary one with noise n = gamma e + mu, and with gamma scaling the fresh noise. So no trigger (mu = 0, gamma = 1) and
the "Trojan" samplers are the same code; outside a patch, mu = 0 and gamma = 1 give the ordinary step pixel by pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from seal_fast.diffusion.process import NoiseProcess
from seal_fast.ops import StepCoefficients, sampler_step


class NoiseTrigger(Protocol):
    """What a sampler reads of a `seal_fast.checkpoints.trigger.Trigger`: shift and scale of the noise, [C,H,W] each."""

    @property
    def mu(self) -> Tensor: ...

    @property
    def gamma(self) -> Tensor: ...


@dataclass(frozen=True)
class NoiseLevel:
    """One rung of the sampling ladder: timestep (-1 is the clean image) and its coefficients."""

    t: int
    a: float
    b: float

    @property
    def log_snr(self) -> float:
        """lambda = log(a / b), the time variable of DPM-Solver++."""
        return math.log(self.a / self.b)


def timestep_grid(process: NoiseProcess, steps: int, spacing: str = "linspace") -> list[int]:
    """Descending timesteps for `steps` evaluations.

    "linspace": evenly from the noisiest timestep that carries signal (T-1, or T-2 with zero terminal SNR) to 0.
    "leading": multiples of T // steps, as diffusers' DDIM default (reaches T-1 only when steps = T).
    "quadratic": int(linspace(0, sqrt(0.8 T), steps)^2), TrojDiff's grid; repeats, which move nothing, are dropped.
    """
    T = process.num_timesteps
    top = T - 1 if process.signal[-1] > 0 else T - 2
    if not 1 <= steps <= top + 1:
        raise ValueError(f"steps must be between 1 and {top + 1}, not {steps}")
    if spacing == "linspace":
        grid = torch.linspace(0, top, steps, dtype=torch.float64).round() if steps > 1 else torch.tensor([float(top)])
    elif spacing == "leading":
        grid = torch.arange(steps, dtype=torch.float64) * (T // steps)
    elif spacing == "quadratic":
        grid = torch.linspace(0, (0.8 * T) ** 0.5, steps, dtype=torch.float64).square().floor()
    else:
        raise ValueError(f"spacing must be linspace, leading or quadratic, not {spacing!r}")
    return sorted({int(t) for t in grid}, reverse=True)


def levels(process: NoiseProcess, timesteps: Sequence[int]) -> list[NoiseLevel]:
    """The ladder through `timesteps`, ending at the clean image."""
    descending = all(high > low for high, low in pairwise(timesteps))
    if not timesteps or not descending or timesteps[0] >= process.num_timesteps or timesteps[-1] < 0:
        raise ValueError(f"timesteps must descend within {process.num_timesteps - 1} .. 0: {list(timesteps)}")
    rungs = [NoiseLevel(t, float(process.signal[t]), float(process.noise[t])) for t in timesteps]
    if rungs[0].a == 0:
        raise ValueError(
            f"timestep {rungs[0].t} carries no signal (zero terminal SNR): predicted noise says nothing of the clean image "
            f"there; start at {rungs[0].t - 1}"
        )
    return [*rungs, NoiseLevel(-1, 1.0, 0.0)]


@lru_cache(maxsize=4096)
def _on_device(step: StepCoefficients, device: torch.device) -> Tensor:
    """A step as `sampler_step` takes it. Kept, because a copy to a GPU waits for it and a CUDA graph cannot hold one."""
    with torch.inference_mode(False):
        return torch.tensor([step], dtype=torch.float64, device=device)


@dataclass(frozen=True)
class _SamplerContext:
    """What every sampler asks for on its way: predicted noise, and steps."""

    denoiser: NoisePredictor
    trigger: NoiseTrigger | None
    limit: float
    generator: torch.Generator | None

    def predicted(self, x: Tensor, at: NoiseLevel) -> Tensor:
        return self.denoiser(x, torch.full((len(x),), at.t, dtype=torch.int64, device=x.device))

    def fresh(self, like: Tensor) -> Tensor:
        device = like.device if self.generator is None else self.generator.device
        return torch.randn(like.shape, generator=self.generator, device=device, dtype=like.dtype).to(like.device)

    def step(
        self, x: Tensor, eps: Tensor, step: StepCoefficients, fresh: Tensor | None = None, previous: Tensor | None = None
    ) -> Tensor:
        """From x [N,C,H,W], where eps was predicted."""
        mu, gamma = (None, None) if self.trigger is None else (self.trigger.mu[None], self.trigger.gamma[None])
        return sampler_step(
            x, eps, _on_device(step, x.device), mu=mu, gamma=gamma, fresh=fresh, previous=previous, limit=self.limit
        )


def _image_step(here: NoiseLevel) -> StepCoefficients:
    """All the way to the predicted clean image."""
    return StepCoefficients(here.a, here.b, from_x=0.0, from_image=1.0)


def _ddim_step(here: NoiseLevel, there: NoiseLevel, eta: float) -> StepCoefficients:
    """a' x0 + b' mu + kept (n - mu) + fresh gamma z, with n = (x - a x0) / b."""
    ratio = here.a / there.a * there.b / here.b
    fresh = eta * there.b * max(0.0, 1 - ratio**2) ** 0.5
    kept = (there.b**2 - fresh**2) ** 0.5
    from_x = kept / here.b
    return StepCoefficients(here.a, here.b, from_x, there.a - from_x * here.a, from_mu=there.b - kept, from_fresh=fresh)


def _ddim(context: _SamplerContext, x: Tensor, rungs: Sequence[NoiseLevel], eta: float = 0.0) -> Tensor:
    """DDIM (Song et al. 2021, equation 12 and 16), in a, b form so that it also holds for VE and EDM.

    eta scales the fresh noise; eta = 1 is ancestral sampling with the posterior ("fixed small") variance. With a trigger this
    is TrojDiff's Trojan DDIM, whose mean keeps b_s mu and whose noise shrinks by gamma.
    """
    for here, there in pairwise(rungs):
        step = _ddim_step(here, there, eta)
        x = context.step(x, context.predicted(x, here), step, fresh=context.fresh(x) if step.from_fresh else None)
    return x


def _ddpm(context: _SamplerContext, x: Tensor, rungs: Sequence[NoiseLevel]) -> Tensor:
    """DDPM ancestral sampling (Ho et al. 2020, equation 7): DDIM with eta = 1."""
    return _ddim(context, x, rungs, eta=1.0)


def _dpm_solver_pp(context: _SamplerContext, x: Tensor, rungs: Sequence[NoiseLevel]) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2); the first and the last step are of first order, which is DDIM's.

    The second order extrapolates the clean image by r = h / (2 h_before), in steps h of log_snr.
    """
    previous: tuple[Tensor, float] | None = None
    for here, there in pairwise(rungs):
        eps = context.predicted(x, here)
        step = _ddim_step(here, there, eta=0.0)
        if there.b == 0:
            return context.step(x, eps, step)
        image, h = context.step(x, eps, _image_step(here)), there.log_snr - here.log_snr
        image_before, r = (None, 0.0) if previous is None else (previous[0], h / (2 * previous[1]))
        extrapolating = step._replace(from_image=step.from_image * (1 + r), from_previous=-step.from_image * r)
        x = context.step(x, eps, extrapolating, previous=image_before)
        previous = image, h
    return x


def _slope_step(here: NoiseLevel, there: NoiseLevel, length: float) -> StepCoefficients:
    """a' (x / a + length n), with n = (x - a x0) / b."""
    from_n = there.a * length / here.b
    return StepCoefficients(here.a, here.b, there.a / here.a + from_n, -from_n * here.a)


def _heun(context: _SamplerContext, x: Tensor, rungs: Sequence[NoiseLevel]) -> Tensor:
    """Heun's second order ODE step (Karras et al. 2022, algorithm 1 without churn) on x / a with time sigma = b / a."""
    for here, there in pairwise(rungs):
        length = there.b / there.a - here.b / here.a
        eps = context.predicted(x, here)
        end = context.step(x, eps, _slope_step(here, there, length))
        if there.b > 0:
            half = context.step(x, eps, _slope_step(here, there, length / 2))
            slope = _slope_step(there, there, length / 2)
            rest = slope._replace(from_x=slope.from_x - 1, from_previous=1.0)
            end = context.step(end, context.predicted(end, there), rest, previous=half)
        x = end
    return x


class NoisePredictor(Protocol):
    """What a sampler needs of a model: its noise process, and the noise [N,C,H,W] that it predicts in x at timesteps t [N]."""

    @property
    def process(self) -> NoiseProcess: ...

    def __call__(self, x: Tensor, t: Tensor, /) -> Tensor: ...


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ddpm": _ddpm, "ddim": _ddim, "dpm-solver++": _dpm_solver_pp, "heun": _heun}


def sample(
    denoiser: NoisePredictor,
    start: Tensor,
    sampler: str = "ddim",
    timesteps: Sequence[int] | int = 50,
    *,
    trigger: NoiseTrigger | None = None,
    clip: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw images from `start`.

    Args:
        denoiser: the model.
        start: x at the first timestep, [N,C,H,W], noise of standard deviation `denoiser.process.prior_scale`.
        sampler: "ddpm" (ancestral), "ddim" (deterministic), "dpm-solver++" (2M) or "heun".
        timesteps: descending timesteps, or how many to space evenly, see `timestep_grid`.
        trigger: use TrojDiff's samplers for this (mu, gamma). BadDiffusion needs none: its trigger enters through `start` only.
        clip: clamp the predicted clean image to [-1, 1] at each step. Steadier for weak models; its gradient is zero
            wherever it clamps, so reversion leaves it off.
        generator: source of the ancestral sampler's fresh noise, on any device: on the CPU a seed means the same everywhere.

    Returns:
        x0, [N,C,H,W]; differentiable in `start` and in the trigger.

    Raises:
        ValueError: unknown sampler, or timesteps that do not descend within the process or carry no signal.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {sorted(SAMPLERS)}, not {sampler!r}")
    grid = timestep_grid(denoiser.process, timesteps) if isinstance(timesteps, int) else timesteps
    context = _SamplerContext(denoiser, trigger, 1.0 if clip else math.inf, generator)
    return SAMPLERS[sampler](context, start, levels(denoiser.process, grid))
