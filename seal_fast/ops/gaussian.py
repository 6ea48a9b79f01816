"""Gaussian statistics of triggers, which decide on models and on inputs.

With a trigger, noise is N(mu, g^2) instead of N(0, 1) in every dimension, g = max(gamma, GAMMA_FLOOR). With D dimensions:

    kl_stats     kl_i = -log g_i + (g_i^2 + mu_i^2 - 1) / 2, the divergence of N(mu_i, g_i^2) from N(0, 1); its mean and
                 variance over i, M_r and V_r, decide on a model (TERD, Mo et al., ICML 2024)
    log_ratio    sum_i [x_i^2 - z_i^2] / 2 - log g_i,  z = (x - mu) / g: log N(x; mu, g^2) - log N(x; 0, 1); positive for an
                 input that looks triggered (same paper)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seal_fast.ops import backends
from seal_fast.ops._arguments import check_tensor, matrices
from seal_fast.ops._launch import SUFFIXES, launch
from seal_fast.ops.dispatch import Op, compiled_implementations

GAMMA_FLOOR = 1e-3
"""Smaller noise scales count as this one. gamma = 0, a trigger that removes the noise, would make every statistic infinite.
(The strongest published attack uses 0.1, so the floor changes no decision on a published attack.)"""


class GaussianKlStats(NamedTuple):
    """Per trigger, each [K]: mean and biased variance over dimensions of kl_i, and the squared norm of mu."""

    mean: Tensor
    variance: Tensor
    squared_norm: Tensor


class Standardisation(NamedTuple):
    """The map from triggered noise to standard noise, z = x scale + shift, which is all that the log ratio needs of a trigger.

    scale = 1/g and shift = -mu/g are [K,D]; offset = -sum log g is float64 [K].
    """

    scale: Tensor
    shift: Tensor
    offset: Tensor


def reference_gaussian_kl_stats(mu: Tensor, gamma: Tensor) -> Tensor:
    """float64 [K,3] from mu, gamma [K,D]: mean kl, variance of kl, squared norm of mu."""
    mu, gamma = mu.double(), gamma.double()
    kl = _divergence(mu, gamma.clamp_min(GAMMA_FLOOR))
    return torch.stack([kl.mean(1), kl.var(1, correction=0), mu.square().sum(1)], dim=1)


def reference_gaussian_log_ratio(x: Tensor, scale: Tensor, shift: Tensor, offset: Tensor) -> Tensor:
    """[N,K] in the dtype of x [N,D]; see `Standardisation` for the rest. Sixty-four inputs at a time stay in cache."""
    out = torch.empty(len(x), len(scale), dtype=torch.float64, device=x.device)
    for inputs, sums in zip(x.split(64), out.split(64), strict=True):
        clean = inputs.square().sum(1, dtype=torch.float64)
        for k in range(len(scale)):
            z = inputs * scale[k] + shift[k]
            sums[:, k] = (clean - z.square().sum(1, dtype=torch.float64)) / 2 + offset[k]
    return out.to(x.dtype)


def _divergence(mu: Tensor, g: Tensor) -> Tensor:
    return (g.square() + mu.square() - 1) / 2 - g.log()


def _run_kl_stats(mu: Tensor, gamma: Tensor) -> Tensor:
    stats = torch.empty(len(mu), 3, dtype=torch.float64, device=mu.device)
    if len(mu):
        numbers = {"gamma_floor": GAMMA_FLOOR, "triggers": mu.shape[0], "dims": mu.shape[1]}
        launch(f"gaussian_kl_stats_{SUFFIXES[mu.dtype]}", {"mu": mu, "gamma": gamma, "stats": stats}, numbers)
    return stats


def _run_log_ratio(x: Tensor, scale: Tensor, shift: Tensor, offset: Tensor) -> Tensor:
    inputs, (triggers, dims) = len(x), scale.shape
    # a GPU cuts the dimensions into slices, each with sums of its own
    slices = backends.CUDA.module.gaussian_log_ratio_slices(inputs, dims) if x.is_cuda else 1
    out = torch.empty(slices, inputs, triggers, dtype=torch.float64, device=x.device)
    if out.numel():
        tensors = {"x": x, "scale": scale, "shift": shift, "offset": offset, "out": out}
        launch(f"gaussian_log_ratio_{SUFFIXES[x.dtype]}", tensors, {"inputs": inputs, "triggers": triggers, "dims": dims})
    return (out.sum(0) if x.is_cuda else out[0]).to(x.dtype)


kl_stats_op = Op(
    "gaussian_kl_stats(Tensor mu, Tensor gamma) -> Tensor",
    compiled_implementations(_run_kl_stats, reference_gaussian_kl_stats),
    fake=lambda mu, gamma: mu.new_empty(mu.shape[0], 3, dtype=torch.float64),
)
log_ratio_op = Op(
    "gaussian_log_ratio(Tensor x, Tensor scale, Tensor shift, Tensor offset) -> Tensor",
    compiled_implementations(_run_log_ratio, reference_gaussian_log_ratio),
    fake=lambda x, scale, shift, offset: x.new_empty(x.shape[0], scale.shape[0]),
)


def _check_triggers(mu: Tensor, gamma: Tensor) -> None:
    check_tensor("mu", mu, ("K", ...))
    check_tensor("gamma", gamma, mu.shape, mu)


def gaussian_kl_stats(mu: Tensor, gamma: Tensor) -> GaussianKlStats:
    """The divergence of the noise of each of K triggers from N(0, I): TERD's features of a model.

    Args:
        mu: shifts [K, ...], any floating point dtype; sums are float64 whatever it is.
        gamma: noise scales, same shape; taken as GAMMA_FLOOR below it.

    Returns:
        Mean, variance, squared norm, each [K], float64, without gradients.

    Raises:
        ValueError: shapes or devices that do not match, or dtypes that are not floating point.
    """
    _check_triggers(mu, gamma)
    mu, gamma = matrices(mu.detach(), gamma.detach())
    return GaussianKlStats(*kl_stats_op(mu, gamma).unbind(1))


def standardise(mu: Tensor, gamma: Tensor) -> Standardisation:
    """Prepare triggers mu, gamma [K, ...] for `standardised_log_ratio`, once for many inputs.

    Raises:
        ValueError: as `gaussian_kl_stats`.
    """
    _check_triggers(mu, gamma)
    mu, gamma = matrices(mu.detach(), gamma.detach())
    g = gamma.clamp_min(GAMMA_FLOOR)
    return Standardisation(1 / g, -mu / g, -g.log().sum(1, dtype=torch.float64))


def standardised_log_ratio(x: Tensor, triggers: Standardisation) -> Tensor:
    """Compute `gaussian_log_ratio` for triggers that `standardise` has prepared. x is [N, ...] with D dimensions in all.

    Raises:
        ValueError: x does not match the triggers.
    """
    check_tensor("x", x, ("N", ...), triggers.scale)
    x = x.detach().flatten(1)
    check_tensor("x with its dimensions joined", x, ("N", triggers.scale.shape[1]), triggers.scale)
    return log_ratio_op(*matrices(x, triggers.scale, triggers.shift), triggers.offset.contiguous())


def gaussian_log_ratio(x: Tensor, mu: Tensor, gamma: Tensor) -> Tensor:
    """log N(x; mu, g^2) - log N(x; 0, I) of N inputs against K triggers, summed over dimensions.

    Args:
        x: inputs [N, ...], any floating point dtype; half precision is computed in float32.
        mu: shifts [K, ...] with the same dimensions.
        gamma: noise scales, same shape as mu; taken as GAMMA_FLOOR below it.

    Returns:
        [N,K], float32 (float64 if an argument is), without gradients.
        Memory holds no more than [N,K] and the inputs. float32 sums are emptied into float64 every 128 terms, so the
        error stays near 1e-7 of sum_i (x_i^2 + z_i^2) / 2.

    Raises:
        ValueError: shapes or devices that do not match, or dtypes that are not floating point.
    """
    _check_triggers(mu, gamma)
    check_tensor("x", x, ("N", *mu.shape[1:]), mu)
    return standardised_log_ratio(x, standardise(mu, gamma))
