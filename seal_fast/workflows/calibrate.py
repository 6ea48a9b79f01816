"""Measure models with known labels: the calibration that later verdicts rest on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from seal_fast.checkpoints import load_denoiser
from seal_fast.noise_triggers import Calibration, CalibrationModel, Settings, model_evidence
from seal_fast.noise_triggers.calibration import group_of
from seal_fast.results.progress import OnProgress, Progress
from seal_fast.verdict import Decision
from seal_fast.workflows.capacity import default_device
from seal_fast.workflows.discovery import Checkpoint
from seal_fast.workflows.revert import revert


def measure(
    benign: Sequence[Checkpoint],
    backdoored: Sequence[Checkpoint],
    settings: Settings,
    *,
    seed: int,
    on_progress: OnProgress,
    on_model: Callable[[CalibrationModel, int, int], None],
) -> Calibration:
    """Recover a trigger from every model and keep the evidence.

    Args:
        benign: models known to be clean.
        backdoored: models known to be backdoored; the calibration is labelled if there are any.
        settings: settings of every reversion, and of later scans that use the calibration.
        seed: seed of every reversion.
        on_progress: called as the work goes on.
        on_model: called with every measured model, its number from 1, and the number of models.

    Raises:
        CheckpointError: a model cannot be loaded. The calibration stops there, since the user asked for a pool with this
            model.
        ValueError: a reversion diverged, or fewer than 2 models are benign.
    """
    labelled = [(checkpoint, False) for checkpoint in benign] + [(checkpoint, True) for checkpoint in backdoored]
    models = []
    for index, (checkpoint, label) in enumerate(labelled, 1):
        at = Progress(checkpoint.name, index, len(labelled), "loading")
        on_progress(at)
        loaded = load_denoiser(checkpoint.path, device=default_device())
        evidence = model_evidence(revert(loaded.denoiser, settings, seed=seed, at=at, on_progress=on_progress))
        family, shape = loaded.denoiser.family, loaded.denoiser.shape
        models.append(CalibrationModel(checkpoint.name, loaded.sha256, family, shape, label, evidence))
        on_model(models[-1], index, len(labelled))
    return Calibration(settings, tuple(models))


def leave_one_out(calibration: Calibration) -> list[tuple[CalibrationModel, Decision]]:
    """The decision on each benign model when the calibration does not contain it.

    Models that compare with only one other benign model are left out, since a pool needs at least two.
    """
    benign = [model for model in calibration.models if not model.backdoored and _others(calibration, model) > 1]
    return [(model, _without(calibration, model).decide(model.evidence, model.family, model.shape)) for model in benign]


def _others(calibration: Calibration, model: CalibrationModel) -> int:
    """The number of other benign models that a benign model compares with."""
    return len(calibration.pools[group_of(calibration.settings, model.family, model.shape)].benign) - 1


def _without(calibration: Calibration, left_out: CalibrationModel) -> Calibration:
    return replace(calibration, models=tuple(model for model in calibration.models if model is not left_out))
