"""Measure a pool of known models: the calibration that later verdicts rest on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from seal_fast.checkpoints import load_denoiser
from seal_fast.noise_triggers import Calibration, CalibrationModel, Decision, Settings, model_evidence, reverse_trigger
from seal_fast.noise_triggers.calibration import group_of
from seal_fast.results.progress import OnProgress, Progress
from seal_fast.workflows.discovery import Candidate
from seal_fast.workflows.scan import default_device, progress_of


def measure(
    benign: Sequence[Candidate],
    backdoored: Sequence[Candidate],
    settings: Settings,
    *,
    seed: int,
    on_progress: OnProgress,
    on_model: Callable[[CalibrationModel, int, int], None],
) -> Calibration:
    """Revert every model of the pool and keep its evidence.

    Args:
        benign: models known to be clean.
        backdoored: models known not to be; the calibration is labelled if there are any.
        settings: of every reversion, and of later scans that use the result.
        seed: of every reversion.
        on_progress: called as the work goes on.
        on_model: called with every finished model, its number from 1, and the size of the pool.

    Raises:
        CheckpointError: a model cannot be loaded. A pool with a hole is not what was asked for, so it stops there.
        ValueError: a reversion diverged, or fewer than 2 models are benign.
    """
    pool = [(candidate, False) for candidate in benign] + [(candidate, True) for candidate in backdoored]
    models = []
    for index, (candidate, label) in enumerate(pool, 1):
        at = Progress(candidate.name, index, len(pool), "loading")
        on_progress(at)
        loaded = load_denoiser(candidate.path, device=default_device())
        on_step = progress_of(settings, at, on_progress)
        evidence = model_evidence(reverse_trigger(loaded.denoiser, settings, seed=seed, on_step=on_step))
        models.append(
            CalibrationModel(candidate.name, loaded.sha256, loaded.denoiser.family, loaded.denoiser.shape, label, evidence)
        )
        on_model(models[-1], index, len(pool))
    return Calibration(settings, tuple(models))


def leave_one_out(calibration: Calibration) -> list[tuple[CalibrationModel, Decision]]:
    """The decision on each benign model, with a calibration that does not hold it.

    Models that compare with only one other benign model are left out, since 1 is no pool.
    """
    benign = [model for model in calibration.models if not model.backdoored and _others(calibration, model) > 1]
    return [(model, _without(calibration, model).decide(model.evidence, model.family, model.shape)) for model in benign]


def _others(calibration: Calibration, model: CalibrationModel) -> int:
    """The number of other benign models that a benign model compares with."""
    return len(calibration.pools[group_of(calibration.settings, model.family, model.shape)].benign) - 1


def _without(calibration: Calibration, left_out: CalibrationModel) -> Calibration:
    return replace(calibration, models=tuple(model for model in calibration.models if model is not left_out))
