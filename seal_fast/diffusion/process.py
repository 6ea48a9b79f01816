"""Noise processes: they noise a clean image to x_t, and convert a network's output to predicted noise.

A process is a table over integer timesteps t = 0 .. T-1. The noise grows with t:

    x_t = a(t) x0 + b(t) eps,    eps ~ N(0, I)

Samplers and the trigger search need nothing else, so each is written once for all processes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from seal_fast.diffusion.family import ModelFamily


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """One value per sample, [N], as [N,1,1,1] in the dtype and on the device of `like` ([N,C,H,W])."""
    return values.to(device=like.device, dtype=like.dtype).reshape(-1, *([1] * (like.ndim - 1)))


class NoiseProcess(ABC):
    """The table of a(t) and b(t), and the input and output convention of networks trained on it.

    Attributes:
        signal: a(t), float64 [T].
        noise: b(t), float64 [T], increasing.
    """

    def __init__(self, signal: Tensor, noise: Tensor) -> None:
        self.signal, self.noise = signal, noise
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        # cached: each copy to a GPU would wait for its queued work, and a CUDA graph cannot contain such a copy
        if device not in self._copies:
            with torch.inference_mode(False):
                self._copies[device] = self.signal.to(device), self.noise.to(device)
        return self._copies[device]

    @property
    def num_timesteps(self) -> int:
        return len(self.signal)

    @property
    def prior_scale(self) -> float:
        """Standard deviation of the noise a sampler starts from: 1 for VP, sigma_max for VE and EDM."""
        return 1.0

    def a(self, t: Tensor) -> Tensor:
        """a at timesteps t (int64 [N]) as float64 [N] on the device of t."""
        return self._tables(t.device)[0][t]

    def b(self, t: Tensor) -> Tensor:
        """b at timesteps t (int64 [N]) as float64 [N] on the device of t."""
        return self._tables(t.device)[1][t]

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t for x0, eps [N,C,H,W] and t int64 [N]."""
        return per_sample(self.a(t), x0) * x0 + per_sample(self.b(t), x0) * eps

    @property
    @abstractmethod
    def family(self) -> ModelFamily:
        """The process, and what the network predicts."""

    @abstractmethod
    def network_input(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The network's arguments for x_t [N,C,H,W] at t int64 [N]: (scaled x, condition [N])."""

    @abstractmethod
    def to_noise(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Convert the network's output for x_t at t to predicted noise eps [N,C,H,W]."""


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class VP(NoiseProcess):
    """Variance preserving (DDPM, Ho et al. 2020): a = sqrt(ab), b = sqrt(1 - ab), a^2 + b^2 = 1.

    Args:
        alphas_cumprod: ab, float [T], decreasing in (0, 1); a terminal value of 0 (zero terminal SNR) is allowed
            for v and sample prediction.
        prediction_type: what the network outputs, one of "epsilon", "v_prediction", "sample".
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str = "epsilon") -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, not {prediction_type!r}")
        ab = alphas_cumprod.to(torch.float64)
        if ab.ndim != 1 or len(ab) < 2:
            raise ValueError(f"alphas_cumprod must be one dimension of at least 2 values, not shape {tuple(ab.shape)}")
        if not (bool((ab >= 0).all()) and bool((ab < 1).all()) and bool((ab.diff() <= 0).all())):
            raise ValueError("alphas_cumprod must decrease within [0, 1)")
        if ab[-1] == 0 and prediction_type == "epsilon":
            raise ValueError(
                "a schedule with zero terminal SNR needs v or sample prediction: at T - 1 noise does not determine x0"
            )
        super().__init__(ab.sqrt(), (1 - ab).sqrt())
        self.prediction_type = prediction_type

    @classmethod
    def linear(cls, timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> VP:
        """The schedule of DDPM: betas that are linear in t."""
        betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
        return cls(torch.cumprod(1 - betas, 0))

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> VP:
        """Read the process from the config of any diffusers VP scheduler (DDPM, DDIM, PNDM, DPM-Solver, ...).

        Only the keys that define the process are read. Missing keys have the defaults of diffusers' DDPMScheduler, which
        computes the betas.
        """
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        keys = (
            "num_train_timesteps",
            "beta_start",
            "beta_end",
            "beta_schedule",
            "trained_betas",
            "prediction_type",
            "rescale_betas_zero_snr",
        )
        scheduler = DDPMScheduler(**{k: config[k] for k in keys if config.get(k) is not None})
        return cls(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    @property
    def family(self) -> ModelFamily:
        return ModelFamily("VP", self.prediction_type)

    def network_input(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, t

    def to_noise(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return output
        a, b = per_sample(self.a(t), x), per_sample(self.b(t), x)
        if self.prediction_type == "v_prediction":
            return a * output + b * x
        return (x - a * output) / b


class VE(NoiseProcess):
    """Variance exploding (NCSN++, Song et al. 2021): a = 1, b = sigma(t).

    The network predicts the score and is conditioned on sigma.

    Args:
        sigmas: float [T], increasing and positive.
    """

    def __init__(self, sigmas: Tensor) -> None:
        sigmas = sigmas.to(torch.float64)
        if sigmas.ndim != 1 or len(sigmas) < 2 or not (bool((sigmas > 0).all()) and bool((sigmas.diff() > 0).all())):
            raise ValueError("sigmas must be one dimension of at least 2 positive, increasing values")
        super().__init__(torch.ones_like(sigmas), sigmas)

    @classmethod
    def geometric(cls, sigma_min: float = 0.01, sigma_max: float = 380.0, timesteps: int = 2000) -> VE:
        """The geometric sigmas of diffusers' ScoreSdeVeScheduler; the defaults are those of VillanDiffusion's NCSN models."""
        return cls(torch.logspace(math.log10(sigma_min), math.log10(sigma_max), timesteps, dtype=torch.float64))

    @property
    def prior_scale(self) -> float:
        return float(self.noise[-1])

    @property
    def family(self) -> ModelFamily:
        return ModelFamily("VE", "score")

    def network_input(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.b(t).to(x.dtype)

    def to_noise(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return -per_sample(self.b(t), x) * output


class EDM(VE):
    """EDM (Karras et al. 2022): a = 1, b = sigma(t) and a preconditioned network F,

        D(x, sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4),    eps = (x - D) / sigma.

    Args:
        sigmas: float [T], increasing and positive.
        sigma_data: standard deviation of the data (Table 1 of the paper).
    """

    def __init__(self, sigmas: Tensor, sigma_data: float = 0.5) -> None:
        super().__init__(sigmas)
        self.sigma_data = sigma_data

    @classmethod
    def karras(
        cls, sigma_min: float = 0.002, sigma_max: float = 80.0, timesteps: int = 1000, rho: float = 7.0, sigma_data: float = 0.5
    ) -> EDM:
        """The sigmas of equation 5 of the paper, ascending."""
        ramp = torch.linspace(0, 1, timesteps, dtype=torch.float64)
        low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
        return cls((low + ramp * (high - low)) ** rho, sigma_data)

    @property
    def family(self) -> ModelFamily:
        return ModelFamily("EDM", "preconditioned")

    def network_input(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.b(t)
        c_in = (sigma**2 + self.sigma_data**2).rsqrt()
        return per_sample(c_in, x) * x, (sigma.log() / 4).to(x.dtype)

    def to_noise(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        sigma = self.b(t)
        total = sigma**2 + self.sigma_data**2
        c_skip, c_out = self.sigma_data**2 / total, sigma * self.sigma_data * total.rsqrt()
        x0 = per_sample(c_skip, x) * x + per_sample(c_out, x) * output
        return (x - x0) / per_sample(sigma, x)
