"""What harmless parts of prompts do: the null that a suspicious part is compared with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

ONE_DEVIATION = 0.841
"""Quantile of a normal distribution one standard deviation above its median."""
EVERYTHING = ""
"""Kind of all units together."""


@dataclass(frozen=True)
class KindNull:
    """Log energies of the harmless units of one kind.

    Attributes:
        median: float32 [T].
        deviation: float32 [T], from the median up to the quantile ONE_DEVIATION. Log energies are skewed downwards, since many
            words do next to nothing, so a two-sided deviation would hide a trigger.
    """

    median: Tensor
    deviation: Tensor


@dataclass(frozen=True)
class UnitNulls:
    """The nulls by kind; also those of all kinds that begin with the same word, and of everything."""

    kinds: dict[str, KindNull]

    @classmethod
    def fitted(cls, kinds: Sequence[str], logs: Tensor, smallest_kind: int, least_deviation: float) -> Self:
        """Fit the nulls.

        Args:
            kinds: kinds of N harmless units.
            logs: their log energies, [N,T].
            smallest_kind: kinds with fewer units have no null of their own.
            least_deviation: least deviation, so that a kind of equals has no outliers.
        """
        members = defaultdict(list)
        for index, kind in enumerate(kinds):
            for name in dict.fromkeys((kind, _family(kind), EVERYTHING)):
                members[name].append(index)
        large = {name: logs[places] for name, places in members.items() if name == EVERYTHING or len(places) >= smallest_kind}
        return cls({name: _null(some, least_deviation) for name, some in large.items()})

    def deviations(self, kinds: Sequence[str], logs: Tensor) -> Tensor:
        """How many deviations units of these kinds [N] lie above the median, float32 [N]: the mean over the T timesteps."""
        nulls = [self._of(kind) for kind in kinds]
        middle, scale = (torch.stack(values) for values in zip(*((null.median, null.deviation) for null in nulls), strict=True))
        return ((logs - middle) / scale).mean(dim=1)

    def _of(self, kind: str) -> KindNull:
        name = next(name for name in (kind, _family(kind), EVERYTHING) if name in self.kinds)
        return self.kinds[name]


def _family(kind: str) -> str:
    return kind.split()[0]


def _null(logs: Tensor, least: float) -> KindNull:
    median = logs.median(dim=0).values
    return KindNull(median, (logs.quantile(ONE_DEVIATION, dim=0) - median).clamp_min(least))
