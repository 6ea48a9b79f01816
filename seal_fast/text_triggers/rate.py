"""A rate with its 95% Wilson interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.stats import binomtest


@dataclass(frozen=True)
class Rate:
    """A rate of successes; its numbers are None if there were no trials.

    Attributes:
        rate: successes / trials.
        low: lower end of the 95% Wilson interval.
        high: upper end of the interval.
        trials: number of trials.
    """

    rate: float | None
    low: float | None
    high: float | None
    trials: int

    def exceeds(self, other: Rate) -> bool:
        """Whether it is larger beyond the 95% interval of the difference (Newcombe 1998, method 10); never without trials."""
        if self.rate is None or self.low is None or other.rate is None or other.high is None:
            return False
        return self.rate - other.rate > math.hypot(self.rate - self.low, other.high - other.rate)

    def __str__(self) -> str:
        """The rate with its interval, in percent; "-" without trials."""
        if self.rate is None or self.low is None or self.high is None:
            return "-"
        return f"{100 * self.rate:.0f}% [{100 * self.low:.0f}, {100 * self.high:.0f}]"


def rate_of(successes: int, trials: int) -> Rate:
    """The rate of `successes` in `trials`."""
    if trials == 0:
        return Rate(None, None, None, 0)
    interval = binomtest(successes, trials).proportion_ci(method="wilson")
    return Rate(successes / trials, float(interval.low), float(interval.high), trials)
