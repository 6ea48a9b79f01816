"""The step that a scan and a calibration share: recover a trigger from one model, and report progress."""

from __future__ import annotations

from seal_fast.diffusion import Denoiser
from seal_fast.noise_triggers import Reversion, Settings, reverse_trigger
from seal_fast.results.progress import OnProgress, Progress
from seal_fast.workflows.stage_progress import share_of_work


def revert(denoiser: Denoiser, settings: Settings, *, seed: int, at: Progress, on_progress: OnProgress) -> Reversion:
    """`reverse_trigger`, which calls `on_progress` after every iteration; `at` names the model and its number."""
    return reverse_trigger(denoiser, settings, seed=seed, on_step=share_of_work(settings.stages, at, on_progress))
