"""How far a workflow has come, as its callbacks report it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a workflow has come.

    Attributes:
        model: name of the current model.
        index: number of the current model, from 1.
        total: number of models.
        stage: name of the current stage.
        iteration: current iteration of the stage, from 1; 0 in a stage without iterations.
        iterations: iterations of the stage.
        fraction: finished share of the work on the current model.
    """

    model: str
    index: int
    total: int
    stage: str
    iteration: int = 0
    iterations: int = 0
    fraction: float = 0.0


OnProgress = Callable[[Progress], None]
"""Called as the work goes on."""
