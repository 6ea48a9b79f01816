"""What harmless parts of prompts do: the null that an unusual part is compared with, and the limit of its deviation."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from seal_fast.text_triggers.detection_settings import PromptDetectionSettings
from seal_fast.text_triggers.part_energies import MeasuredPrompt
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
    def fitted(cls, prompts: Sequence[MeasuredPrompt], settings: PromptDetectionSettings) -> Self:
        """Fit the nulls to the parts of harmless prompts. A kind of fewer than `smallest_kind` parts has no null of its own."""
        members = defaultdict(list)
        for prompt in prompts:
            for kind, log in zip(prompt.kinds, prompt.logs, strict=True):
                for name in dict.fromkeys(_wider(kind)):
                    members[name].append(log)
        large = {name: some for name, some in members.items() if name == EVERYTHING or len(some) >= settings.smallest_kind}
        return cls({name: _null(torch.stack(some), settings.least_deviation) for name, some in large.items()})

    def deviations(self, prompt: MeasuredPrompt) -> Tensor:
        """How many deviations each part of a prompt lies above the median of its kind, float32 [N]: the mean over timesteps.

        A kind without a null compares with the next wider one; without any null at all a part lies 0 deviations above.
        """
        if not self.kinds or not prompt.parts:
            return torch.zeros(len(prompt.parts))
        nulls = [self.kinds[next(name for name in _wider(kind) if name in self.kinds)] for kind in prompt.kinds]
        median, deviation = (torch.stack(values) for values in zip(*nulls, strict=True))
        return ((prompt.logs - median) / deviation).mean(dim=1)


def _wider(kind: str) -> tuple[str, str, str]:
    """The kind, all kinds that begin with the same word, and everything."""
    return kind, kind.split()[0], EVERYTHING


def _null(logs: Tensor, least: float) -> tuple[Tensor, Tensor]:
    median = logs.median(dim=0).values
    return median, (NORMAL_MAD * (logs - median).abs().median(dim=0).values).clamp_min(least)


def conformal_limit(groups: Sequence[Sequence[tuple[str, MeasuredPrompt]]], settings: PromptDetectionSettings) -> float:
    """The least limit that keeps the false alarm rate in each group of harmless prompts.

    The rank is that of conformal prediction: of n + 1 exchangeable scores the last one exceeds the k-th of the others with a
    probability of at most 1 - k / (n + 1).

    Args:
        groups: (source, prompt) of each group. Prompts made from one clean prompt, their source, are left out of each other's
            nulls, so that each is scored as a new one.
        settings: settings of the detector.
    """
    everyone = [pair for group in groups for pair in group]
    nulls = {
        source: PartNulls.fitted([prompt for other, prompt in everyone if other != source], settings)
        for source in dict.fromkeys(source for source, _ in everyone)
    }
    limits = []
    for group in filter(None, groups):
        scores = sorted(
            float(nulls[source].deviations(prompt).max()) if prompt.parts else -math.inf for source, prompt in group
        )
        rank = math.ceil((len(scores) + 1) * (1 - settings.false_alarm_rate))
        limits.append(scores[min(rank, len(scores)) - 1])
    return max(limits)
