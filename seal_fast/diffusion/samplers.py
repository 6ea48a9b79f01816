"""Samplers, written once for every noise process and differentiable in the start and in the trigger.

A step goes from timestep t to s < t, or to the clean image (a = 1, b = 0). Let e be the predicted noise. For a trigger
(mu, gamma), TrojDiff (Chen et al., CVPR 2023) shows that the reverse process of

    x_t = a x0 + b (gamma eps + mu)

is the ordinary one with noise n = gamma e + mu and fresh noise scaled by gamma. The same code therefore serves as the ordinary
sampler (mu = 0, gamma = 1) and as TrojDiff's "Trojan" sampler. A patch trigger has mu = 0 and gamma = 1 outside its patch, so
these pixels take the ordinary step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from seal_fast.diffusion.process import NoiseProcess
from seal_fast.ops import StepCoefficients, sampler_step


class NoiseTrigger(Protocol):
    """Shift and scale of the noise, [C,H,W] each, as a `seal_fast.checkpoints.trigger.Trigger` has them."""

    @property
    def mu(self) -> Tensor: ...

    @property
    def gamma(self) -> Tensor: ...


@dataclass(frozen=True)
class NoiseLevel:
    """A timestep of the sampling grid (-1 is the clean image) with its coefficients a and b."""

    t: int
    a: float
    b: float

    @property
    def log_snr(self) -> float:
        """lambda = log(a / b), the time variable of DPM-Solver++."""
        return math.log(self.a / self.b)


def timestep_grid(process: NoiseProcess, steps: int, spacing: str = "linspace") -> list[int]:
    """Descending timesteps for `steps` evaluations.

    "linspace": evenly spaced from the noisiest timestep that carries signal (T-1, or T-2 with zero terminal SNR) to 0.
    "leading": multiples of T // steps, the default of diffusers' DDIM; includes T-1 only if steps = T.
    "quadratic": int(linspace(0, sqrt(0.8 T), steps)^2), TrojDiff's grid, without repeats, which would be steps of length 0.
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


def noise_levels(process: NoiseProcess, timesteps: Sequence[int]) -> list[NoiseLevel]:
    """The noise levels at `timesteps`, followed by the clean image."""
    descending = all(high > low for high, low in pairwise(timesteps))
    if not timesteps or not descending or timesteps[0] >= process.num_timesteps or timesteps[-1] < 0:
        raise ValueError(f"timesteps must descend within {process.num_timesteps - 1} .. 0: {list(timesteps)}")
    levels = [NoiseLevel(t, float(process.signal[t]), float(process.noise[t])) for t in timesteps]
    if levels[0].a == 0:
        raise ValueError(
            f"timestep {levels[0].t} carries no signal (zero terminal SNR): predicted noise does not determine the clean image "
            f"there; start at {levels[0].t - 1}"
        )
    return [*levels, NoiseLevel(-1, 1.0, 0.0)]


@dataclass(frozen=True)
class _SamplerContext:
    """The operations that every sampler is made of: predict noise, draw fresh noise, take a step."""

    denoiser: NoisePredictor
    trigger: NoiseTrigger | None
    limit: float
    generator: torch.Generator | None

    def predict_noise(self, x: Tensor, at: NoiseLevel) -> Tensor:
        return self.denoiser(x, torch.full((len(x),), at.t, dtype=torch.int64, device=x.device))

    def fresh_noise(self, like: Tensor) -> Tensor:
        device = like.device if self.generator is None else self.generator.device
        return torch.randn(like.shape, generator=self.generator, device=device, dtype=like.dtype).to(like.device)

    def step(
        self, x: Tensor, eps: Tensor, step: StepCoefficients, fresh: Tensor | None = None, previous: Tensor | None = None
    ) -> Tensor:
        """Take one step from x [N,C,H,W], for which eps was predicted."""
        mu, gamma = (None, None) if self.trigger is None else (self.trigger.mu, self.trigger.gamma)
        return sampler_step(x, eps, step, mu=mu, gamma=gamma, fresh=fresh, previous=previous, limit=self.limit)


def _image_step(here: NoiseLevel) -> StepCoefficients:
    """Coefficients of the step to the predicted clean image."""
    return StepCoefficients(here.a, here.b, from_x=0.0, from_image=1.0)


def _ddim_step(here: NoiseLevel, there: NoiseLevel, eta: float) -> StepCoefficients:
    """Coefficients of a' x0 + b' mu + kept (n - mu) + fresh gamma z, with n = (x - a x0) / b."""
    ratio = here.a / there.a * there.b / here.b
    fresh = eta * there.b * max(0.0, 1 - ratio**2) ** 0.5
    kept = (there.b**2 - fresh**2) ** 0.5
    from_x = kept / here.b
    return StepCoefficients(here.a, here.b, from_x, there.a - from_x * here.a, from_mu=there.b - kept, from_fresh=fresh)


def _ddim(context: _SamplerContext, x: Tensor, levels: Sequence[NoiseLevel], eta: float = 0.0) -> Tensor:
    """DDIM (Song et al. 2021, equations 12 and 16) in terms of a and b, so that it also holds for VE and EDM.

    eta scales the fresh noise; eta = 1 is ancestral sampling with the posterior ("fixed small") variance. With a trigger this
    is TrojDiff's Trojan DDIM: its mean contains b_s mu, and its noise is scaled by gamma.
    """
    for here, there in pairwise(levels):
        step = _ddim_step(here, there, eta)
        x = context.step(x, context.predict_noise(x, here), step, fresh=context.fresh_noise(x) if step.from_fresh else None)
    return x


def _ddpm(context: _SamplerContext, x: Tensor, levels: Sequence[NoiseLevel]) -> Tensor:
    """DDPM ancestral sampling (Ho et al. 2020, equation 7): DDIM with eta = 1."""
    return _ddim(context, x, levels, eta=1.0)


def _dpm_solver_pp(context: _SamplerContext, x: Tensor, levels: Sequence[NoiseLevel]) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2). The first and the last step are of first order, which is DDIM.

    A second-order step extrapolates the predicted clean image by r = h / (2 h_before), where h is the step in log_snr.
    """
    previous: tuple[Tensor, float] | None = None
    for here, there in pairwise(levels):
        eps = context.predict_noise(x, here)
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
    """Coefficients of a' (x / a + length n), with n = (x - a x0) / b."""
    from_n = there.a * length / here.b
    return StepCoefficients(here.a, here.b, there.a / here.a + from_n, -from_n * here.a)


def _heun(context: _SamplerContext, x: Tensor, levels: Sequence[NoiseLevel]) -> Tensor:
    """Heun's second-order ODE step (Karras et al. 2022, algorithm 1 without churn) on x / a with time sigma = b / a."""
    for here, there in pairwise(levels):
        length = there.b / there.a - here.b / here.a
        eps = context.predict_noise(x, here)
        end = context.step(x, eps, _slope_step(here, there, length))
        if there.b > 0:
            half = context.step(x, eps, _slope_step(here, there, length / 2))
            slope = _slope_step(there, there, length / 2)
            rest = slope._replace(from_x=slope.from_x - 1, from_previous=1.0)
            end = context.step(end, context.predict_noise(end, there), rest, previous=half)
        x = end
    return x


class NoisePredictor(Protocol):
    """A model as samplers need it: its noise process, and the noise [N,C,H,W] that it predicts in x at timesteps t [N]."""

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
        timesteps: descending timesteps, or a number of evenly spaced ones, see `timestep_grid`.
        trigger: (mu, gamma) for TrojDiff's samplers. BadDiffusion needs none: its trigger enters through `start` only.
        clip: clamp the predicted clean image to [-1, 1] at each step. This stabilises weak models. The gradient is zero
            wherever the clamp acts, so reversion leaves it off.
        generator: source of the ancestral sampler's fresh noise, on any device. On the CPU a seed gives the same noise
            whatever the denoiser's device.

    Returns:
        x0, [N,C,H,W]; differentiable in `start` and in the trigger.

    Raises:
        ValueError: unknown sampler, or timesteps that do not descend within the process or carry no signal.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {sorted(SAMPLERS)}, not {sampler!r}")
    grid = timestep_grid(denoiser.process, timesteps) if isinstance(timesteps, int) else timesteps
    context = _SamplerContext(denoiser, trigger, 1.0 if clip else math.inf, generator)
    return SAMPLERS[sampler](context, start, noise_levels(denoiser.process, grid))
