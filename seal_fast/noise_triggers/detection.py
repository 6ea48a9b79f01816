"""Statistics of a recovered trigger (evidence), and TERD's test for triggered inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seal_fast.checkpoints.trigger import Trigger
from seal_fast.noise_triggers.reversion import Reversion
from seal_fast.ops import gaussian_kl_stats, standardise, standardised_log_ratio

LARGEST = 10.0
"""Standard deviations that no value of noise exceeds; of 10^12 normal values the largest is near 7."""


@dataclass(frozen=True)
class Evidence:
    """Statistics of a recovered trigger; None where the reversion diverged.

    Attributes:
        M_r: mean over dimensions of KL( N(mu_i, gamma_i^2) || N(0, 1) ), in nats.
        V_r: biased variance over dimensions of the same divergence.
        mu_norm: L2 norm of mu.
        gamma_mean: mean of gamma.
        reversed_loss: residual per dimension that the reversion ended with, see `Reversion.loss`.
        collapse: diversity collapse, how many times less the model's samples vary with the trigger; None if it was not tested.
        clean_dispersion: dispersion of the model's samples without a trigger (see `seal_fast.noise_triggers.activation_test`);
            None if the trigger was not tested.
        sampler: name of the sampler that the trigger was tested with; None if it was not tested.
    """

    M_r: float | None
    V_r: float | None
    mu_norm: float | None
    gamma_mean: float | None
    reversed_loss: float | None
    collapse: float | None = None
    clean_dispersion: float | None = None
    sampler: str | None = None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def model_evidence(reversion: Reversion) -> Evidence:
    """The evidence of a model: mean and variance of TERD's divergence, the trigger's size, and the activation test."""
    if not reversion.finite:
        return Evidence(None, None, None, None, None)
    trigger = reversion.trigger
    stats = gaussian_kl_stats(trigger.mu[None], trigger.gamma[None])
    return Evidence(
        M_r=_finite(float(stats.mean)),
        V_r=_finite(float(stats.variance)),
        mu_norm=_finite(float(stats.squared_norm.sqrt())),
        gamma_mean=_finite(float(trigger.gamma.mean())),
        reversed_loss=_finite(reversion.loss),
        collapse=_finite(reversion.collapse),
        clean_dispersion=_finite(reversion.clean_dispersion),
        sampler=reversion.sampler,
    )


class InputDetector:
    """Finds noise inputs that carry one of the given triggers.

    An input is triggered when its log density under N(mu, gamma^2) exceeds that under N(0, I) (TERD, input detection).

    Args:
        triggers: one trigger or several, all of one shape and one prior scale, which is the standard deviation of clean inputs.
    """

    def __init__(self, triggers: Trigger | Sequence[Trigger]) -> None:
        several = [triggers] if isinstance(triggers, Trigger) else list(triggers)
        if not several:
            raise ValueError("InputDetector needs at least one trigger")
        shapes = {tuple(trigger.mu.shape) for trigger in several}
        if len(shapes) > 1:
            raise ValueError(f"triggers must share one shape, not {sorted(shapes)}")
        scales = {trigger.prior_scale for trigger in several}
        if len(scales) > 1:
            raise ValueError(f"triggers must share one prior scale, not {sorted(scales)}")
        self.triggers = standardise(
            torch.stack([trigger.mu for trigger in several]), torch.stack([trigger.gamma for trigger in several])
        )
        self.prior_scale, self.shape = several[0].prior_scale, tuple(several[0].mu.shape)
        spread = max(1.0, *(float(trigger.gamma.max()) for trigger in several))
        self.largest = LARGEST * spread + max(float(trigger.mu.abs().max()) for trigger in several)

    def log_ratio(self, x: Tensor) -> Tensor:
        """log N(x; mu_k, gamma_k^2) - log N(x; 0, I) in nats, [N,K], for inputs [N,C,H,W].

        Raises:
            ValueError: x is no tensor of the triggers' shape [C,H,W], one or several; or an input holds a value that neither
                clean nor triggered noise has, or for which a density leaves the range of floating-point numbers. Where a gamma
                is below 1, one such value hides a trigger.
        """
        if not isinstance(x, Tensor) or x.ndim != 4 or tuple(x.shape[1:]) != self.shape:
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"inputs must be a tensor [N, {', '.join(map(str, self.shape))}], as the triggers are, not {found}"
            )
        x = x / self.prior_scale if self.prior_scale != 1 else x
        low, high = x.aminmax()
        if not (-self.largest <= low and high <= self.largest):
            raise ValueError(
                f"the inputs are no noise: their values reach from {float(low):.3g} to {float(high):.3g}, and neither clean nor"
                f" triggered noise exceeds {self.largest:.3g}, in units of the prior scale {self.prior_scale:g}"
            )
        ratios = standardised_log_ratio(x, self.triggers)
        if not ratios.isfinite().all():
            raise ValueError("the trigger's values are too large or too small to tell its density: no input can be decided")
        return ratios

    def __call__(self, x: Tensor) -> Tensor:
        """bool [N]: True where an input [N,C,H,W] carries any of the triggers."""
        return (self.log_ratio(x) > 0).any(dim=1)
