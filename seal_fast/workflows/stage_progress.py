"""Turn the stages of a search into the finished share of its work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from seal_fast.results.progress import OnProgress, Progress
from seal_fast.training import OnStep, Stage


def share_of_work(stages: Sequence[Stage], at: Progress, on_progress: OnProgress) -> OnStep:
    """A callback of a search that turns iterations into the finished share of the work, counted in images through the network.

    Args:
        stages: every stage that the search reports.
        at: names the model and its number.
        on_progress: called after every iteration.
    """
    whole = sum(stage.iterations * stage.images for stage in stages)
    before, starts = 0, {}
    for stage in stages:
        starts[stage.name] = before, stage.iterations * stage.images
        before += stage.iterations * stage.images

    def on_step(stage: str, iteration: int, iterations: int, loss: float) -> None:
        start, images = starts[stage]
        fraction = (start + images * iteration / iterations) / whole
        on_progress(replace(at, stage=stage, iteration=iteration, iterations=iterations, fraction=fraction))

    return on_step
