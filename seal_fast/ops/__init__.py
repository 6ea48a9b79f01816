"""The public functions of all kernels. Each runs on the fastest implementation that this machine has."""

from seal_fast.ops.cross_attention import cross_attention
from seal_fast.ops.dispatch import OpStatus, explain
from seal_fast.ops.gaussian import (
    GAMMA_FLOOR,
    GaussianKlStats,
    Standardisation,
    gaussian_kl_stats,
    gaussian_log_ratio,
    standardise,
    standardised_log_ratio,
)
from seal_fast.ops.group_norm_silu import group_norm_silu
from seal_fast.ops.reversed_loss import reversed_loss
from seal_fast.ops.sampler_step import StepCoefficients, sampler_step
from seal_fast.ops.winograd_convolution import WinogradWeight, winograd_convolution

__all__ = [
    "GAMMA_FLOOR",
    "GaussianKlStats",
    "OpStatus",
    "Standardisation",
    "StepCoefficients",
    "WinogradWeight",
    "cross_attention",
    "explain",
    "gaussian_kl_stats",
    "gaussian_log_ratio",
    "group_norm_silu",
    "reversed_loss",
    "sampler_step",
    "standardise",
    "standardised_log_ratio",
    "winograd_convolution",
]
