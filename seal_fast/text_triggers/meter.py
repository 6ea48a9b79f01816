"""Count the UNet evaluations of a search, report its progress, and end it when its budget is spent."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, field

from seal_fast.text_triggers.search_settings import Budget
from seal_fast.training import OnStep, Stage


class BudgetSpent(Exception):
    """The search has used its evaluations or its time."""


@dataclass
class Meter:
    """Counts evaluations; call it with the number of every pass.

    Attributes:
        stages: planned stages with their evaluations, for progress.
        budget: raises BudgetSpent when it is spent, but not in the first stage, without which nothing can be said.
        on_step: progress callback.
        evaluations: evaluations of one latent so far.
    """

    stages: dict[str, Stage]
    budget: Budget
    on_step: OnStep
    evaluations: int = 0
    _stage: str = ""
    _done: Counter[str] = field(default_factory=Counter)
    _started: float = field(default_factory=time.monotonic)

    def begin(self, stage: str) -> None:
        """The passes from now on belong to this stage."""
        self._stage = stage

    def __call__(self, evaluations: int) -> None:
        self.evaluations += evaluations
        self._done[self._stage] += evaluations
        planned = self.stages[self._stage].images
        self.on_step(self._stage, min(self._done[self._stage], planned), planned, math.nan)
        if self._stage == next(iter(self.stages)):
            return
        spent = self.budget.evaluations is not None and self.evaluations >= self.budget.evaluations
        late = self.budget.seconds is not None and time.monotonic() - self._started >= self.budget.seconds
        if spent or late:
            raise BudgetSpent
