"""What harmless parts of prompts do: the null that a suspicious part is compared with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from seal_fast.text_triggers.ranking import NORMAL_MAD

EVERYTHING = ""
"""Kind of all parts together."""


@dataclass(frozen=True)
class PartNulls:
    """Median and deviation of the log energies of harmless parts, float32 [T] each, by kind.

    The deviation is the median absolute one, scaled to a normal distribution's. A kind may also be the first word of several
    kinds, or EVERYTHING.
    """

    kinds: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def fitted(cls, kinds: Sequence[str], logs: Tensor, smallest_kind: int, least_deviation: float) -> Self:
        """Fit the nulls.

        Args:
            kinds: kinds of N harmless parts.
            logs: their log energies, [N,T].
            smallest_kind: kinds with fewer parts have no null of their own.
            least_deviation: least deviation, so that a kind of equals has no outliers.
        """
        members = defaultdict(list)
        for index, kind in enumerate(kinds):
            for name in _wider(kind):
                members[name].append(index)
        large = {name: logs[places] for name, places in members.items() if name == EVERYTHING or len(places) >= smallest_kind}
        return cls({name: _null(some, least_deviation) for name, some in large.items()})

    def deviations(self, kinds: Sequence[str], logs: Tensor) -> Tensor:
        """How many deviations parts of these kinds [N] lie above the median, float32 [N]: the mean over the T timesteps.

        A kind without a null compares with the next wider one; without any null at all a part lies 0 deviations above.
        """
        if not self.kinds:
            return torch.zeros(len(kinds))
        nulls = [self.kinds[next(name for name in _wider(kind) if name in self.kinds)] for kind in kinds]
        median, deviation = (torch.stack(values) for values in zip(*nulls, strict=True))
        return ((logs - median) / deviation).mean(dim=1)


def _wider(kind: str) -> tuple[str, str, str]:
    """The kind, all kinds that begin with the same word, and everything."""
    return kind, kind.split()[0], EVERYTHING


def _null(logs: Tensor, least: float) -> tuple[Tensor, Tensor]:
    median = logs.median(dim=0).values
    return median, (NORMAL_MAD * (logs - median).abs().median(dim=0).values).clamp_min(least)
