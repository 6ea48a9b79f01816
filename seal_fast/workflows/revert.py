"""The step that a scan and a calibration share: recover a trigger from one model, and report progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from seal_fast.diffusion import Denoiser
from seal_fast.noise_triggers import Reversion, Settings, reverse_trigger
from seal_fast.results.progress import OnProgress, Progress
from seal_fast.training import Stage


def revert(denoiser: Denoiser, settings: Settings, *, seed: int, at: Progress, on_progress: OnProgress) -> Reversion:
    """`reverse_trigger`, which calls `on_progress` after every iteration; `at` names the model and its number."""
    return reverse_trigger(denoiser, settings, seed=seed, on_step=_share_of_work(settings.stages, at, on_progress))


def _share_of_work(stages: Sequence[Stage], at: Progress, on_progress: OnProgress) -> Callable[[str, int, int, float], None]:
    """A callback of `reverse_trigger` that turns iterations into the finished share of the work, counted in denoised images."""
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
