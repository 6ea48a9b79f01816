"""A share with its 95% Wilson interval."""

from __future__ import annotations

from dataclasses import dataclass

from scipy.stats import binomtest


@dataclass(frozen=True)
class Rate:
    """Successes over trials; None where there were no trials.

    Attributes:
        rate: successes / trials.
        low: lower end of the 95% Wilson interval.
        high: upper end.
        trials: how many.
    """

    rate: float | None
    low: float | None
    high: float | None
    trials: int


def rate_of(successes: int, trials: int) -> Rate:
    """The share `successes` of `trials` make."""
    if trials == 0:
        return Rate(None, None, None, 0)
    interval = binomtest(successes, trials).proportion_ci(method="wilson")
    return Rate(successes / trials, float(interval.low), float(interval.high), trials)
