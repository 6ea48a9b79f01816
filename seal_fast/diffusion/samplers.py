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
from itertools import pairwise

import torch
from torch import Tensor

from seal_fast.diffusion.denoiser import Denoiser
from seal_fast.diffusion.process import NoiseProcess
from seal_fast.diffusion.trigger import Trigger


@dataclass(frozen=True)
class Level:
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


def levels(process: NoiseProcess, timesteps: Sequence[int]) -> list[Level]:
    """The ladder through `timesteps`, ending at the clean image."""
    descending = all(high > low for high, low in pairwise(timesteps))
    if not timesteps or not descending or timesteps[0] >= process.num_timesteps or timesteps[-1] < 0:
        raise ValueError(f"timesteps must descend within {process.num_timesteps - 1} .. 0: {list(timesteps)}")
    rungs = [Level(t, float(process.signal[t]), float(process.noise[t])) for t in timesteps]
    if rungs[0].a == 0:
        raise ValueError(
            f"timestep {rungs[0].t} carries no signal (zero terminal SNR): predicted noise says nothing of the clean image "
            f"there; start at {rungs[0].t - 1}"
        )
    return [*rungs, Level(-1, 1.0, 0.0)]


class Prediction:
    """What every sampler asks of the model at one level: clean image x0 and noise n, with a x0 + b n = x."""

    def __init__(self, denoiser: Denoiser, trigger: Trigger | None, clip: bool) -> None:
        self.denoiser, self.clip = denoiser, clip
        self.mu: Tensor | float = 0.0 if trigger is None else trigger.mu
        self.gamma: Tensor | float = 1.0 if trigger is None else trigger.gamma

    def __call__(self, x: Tensor, at: Level) -> tuple[Tensor, Tensor]:
        t = torch.full((len(x),), at.t, dtype=torch.int64, device=x.device)
        n = self.gamma * self.denoiser(x, t) + self.mu
        x0 = (x - at.b * n) / at.a
        if self.clip:
            x0 = x0.clamp(-1, 1)
            n = (x - at.a * x0) / at.b
        return x0, n


def _ddim(
    predict: Prediction, x: Tensor, rungs: Sequence[Level], generator: torch.Generator | None, eta: float = 0.0
) -> Tensor:
    """DDIM (Song et al. 2021, equation 12 and 16), in a, b form so that it also holds for VE and EDM.

    eta scales the fresh noise; eta = 1 is ancestral sampling with the posterior ("fixed small") variance. With a trigger this
    is TrojDiff's Trojan DDIM, whose mean keeps b_s mu and whose noise shrinks by gamma.
    """
    for here, there in pairwise(rungs):
        x0, n = predict(x, here)
        ratio = here.a / there.a * there.b / here.b
        fresh = eta * there.b * max(0.0, 1 - ratio**2) ** 0.5
        kept = (there.b**2 - fresh**2) ** 0.5
        if fresh == 0:
            x = there.a * x0 + there.b * n
            continue
        z = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x = there.a * x0 + there.b * predict.mu + kept * (n - predict.mu) + predict.gamma * fresh * z
    return x


def _ddpm(predict: Prediction, x: Tensor, rungs: Sequence[Level], generator: torch.Generator | None) -> Tensor:
    """DDPM ancestral sampling (Ho et al. 2020, equation 7): DDIM with eta = 1."""
    return _ddim(predict, x, rungs, generator, eta=1.0)


def _dpm_solver_pp(predict: Prediction, x: Tensor, rungs: Sequence[Level], generator: torch.Generator | None) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2); the first and the last step are of first order."""
    previous: tuple[Tensor, float] | None = None
    for here, there in pairwise(rungs):
        x0, _ = predict(x, here)
        if there.b == 0:
            return x0
        h = there.log_snr - here.log_snr
        direction = x0
        if previous is not None:
            x0_before, h_before = previous
            direction = x0 + h / (2 * h_before) * (x0 - x0_before)
        x = there.b / here.b * x + (there.a - there.b / here.b * here.a) * direction
        previous = x0, h
    return x


def _heun(predict: Prediction, x: Tensor, rungs: Sequence[Level], generator: torch.Generator | None) -> Tensor:
    """Heun's second order ODE step (Karras et al. 2022, algorithm 1 without churn) on x / a with time sigma = b / a."""
    for here, there in pairwise(rungs):
        step = there.b / there.a - here.b / here.a
        _, n = predict(x, here)
        end = there.a * (x / here.a + step * n)
        if there.b > 0:
            _, n_end = predict(end, there)
            end = there.a * (x / here.a + step * (n + n_end) / 2)
        x = end
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ddpm": _ddpm, "ddim": _ddim, "dpm-solver++": _dpm_solver_pp, "heun": _heun}


def sample(
    denoiser: Denoiser,
    start: Tensor,
    sampler: str = "ddim",
    timesteps: Sequence[int] | int = 50,
    *,
    trigger: Trigger | None = None,
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
        generator: source of the ancestral sampler's fresh noise.

    Returns:
        x0, [N,C,H,W]; differentiable in `start` and in the trigger.

    Raises:
        ValueError: unknown sampler, or timesteps that do not descend within the process or carry no signal.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {sorted(SAMPLERS)}, not {sampler!r}")
    grid = timestep_grid(denoiser.process, timesteps) if isinstance(timesteps, int) else timesteps
    return SAMPLERS[sampler](Prediction(denoiser, trigger, clip), start, levels(denoiser.process, grid), generator)
