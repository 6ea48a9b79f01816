"""Public face of every kernel: differentiable functions that run on the fastest implementation this machine has."""

from seal_fast.ops.attention_distillation import attention_distillation
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

__all__ = [
    "GAMMA_FLOOR",
    "GaussianKlStats",
    "OpStatus",
    "Standardisation",
    "attention_distillation",
    "cross_attention",
    "explain",
    "gaussian_kl_stats",
    "gaussian_log_ratio",
    "standardise",
    "standardised_log_ratio",
]
