"""Scan one model: load the checkpoint, recover a trigger, decide on a verdict, record trigger and images."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

from seal_fast.checkpoints import CheckpointError, LoadedCheckpoint, load_denoiser
from seal_fast.noise_triggers import Calibration, Reversion, model_evidence
from seal_fast.results.progress import OnProgress, Progress
from seal_fast.results.scan import ModelResult
from seal_fast.verdict import Verdict
from seal_fast.workflows.capacity import default_device
from seal_fast.workflows.discovery import Checkpoint
from seal_fast.workflows.processes import Died
from seal_fast.workflows.resume import config_digest
from seal_fast.workflows.revert import revert
from seal_fast.workflows.trigger_files import TRIGGER_FILE, save_images, save_trigger

Task = tuple[int, Checkpoint]
"""A checkpoint with its place in the report, from 0."""


@dataclass(frozen=True)
class ModelScan:
    """Scans one model when it is called. It pickles, so that a process of its own can call it.

    Attributes:
        calibration: the calibration that decides; the reversion takes its settings from it.
        weights: "ema" or "raw", where a checkpoint holds both.
        seed: seed of the reversion and of the images.
        out: folder for triggers and images; None keeps none.
        total: number of models in the whole scan, for progress.
    """

    calibration: Calibration
    weights: str
    seed: int
    out: Path | None
    total: int

    def __call__(self, task: Task, on_progress: OnProgress) -> ModelResult:
        """The result of one model; any exception on the way to the verdict becomes an `error` result."""
        started = time.perf_counter()
        place, checkpoint = task
        at = Progress(checkpoint.name, place + 1, self.total, "loading")
        on_progress(at)
        loaded = None
        try:
            loaded = load_denoiser(checkpoint.path, weights=self.weights, device=default_device())
            settings = self.calibration.settings
            reversion = revert(loaded.denoiser, settings, seed=self.seed, at=at, on_progress=on_progress)
            evidence = model_evidence(reversion)
            decision = self.calibration.decide(evidence, loaded.denoiser.family, loaded.denoiser.shape)
            config_sha256 = config_digest(loaded.denoiser)
        except Exception as error:
            return error_result(checkpoint, loaded, _in_one_line(error, checkpoint), time.perf_counter() - started)
        on_progress(replace(at, stage="images", fraction=1.0))
        trigger, notes = self._record(checkpoint, loaded, reversion)
        return ModelResult(
            path=checkpoint.name,
            sha256=loaded.sha256,
            format=loaded.format,
            family=loaded.denoiser.family,
            verdict=decision.verdict,
            rule=decision.rule,
            score=decision.score,
            threshold=decision.threshold,
            reason=decision.reason,
            evidence=evidence,
            trigger=trigger,
            seconds=time.perf_counter() - started,
            error=None,
            candidates=reversion.candidates,
            notes=(*loaded.notes, *notes),
            config_sha256=config_sha256,
        )

    def _record(
        self, checkpoint: Checkpoint, loaded: LoadedCheckpoint, reversion: Reversion
    ) -> tuple[str | None, tuple[str, ...]]:
        """Write the trigger and its images; returns the trigger's path relative to `out`, and notes."""
        if self.out is None or not reversion.finite:
            return None, ()
        folder, kept = self.out / checkpoint.name, None
        try:
            save_trigger(reversion, loaded.denoiser, loaded.sha256, folder)
            kept = f"{checkpoint.name}/{TRIGGER_FILE}"
            save_images(reversion, loaded.denoiser, self.seed, folder)
        except Exception as error:
            # the verdict stands without its images, and a full disk must not hide a backdoor
            return kept, (f"trigger or images not kept: {_in_one_line(error, checkpoint)}",)
        return kept, ()


def error_result(checkpoint: Checkpoint, loaded: LoadedCheckpoint | None, reason: str, seconds: float) -> ModelResult:
    """The result of a model that could not be scanned; `loaded` is None if it could not be loaded."""
    return ModelResult(
        path=checkpoint.name,
        sha256=loaded.sha256 if loaded else None,
        format=loaded.format if loaded else None,
        family=loaded.denoiser.family if loaded else None,
        verdict=Verdict.ERROR,
        rule=None,
        score=None,
        threshold=None,
        reason=reason,
        evidence=None,
        trigger=None,
        seconds=seconds,
        error=reason,
    )


def lost_result(checkpoint: Checkpoint, end: Died) -> ModelResult:
    """The result of a model whose process ended without one."""
    code = end.exit_code
    if code is not None and code < 0:
        reason = f"its process was killed by signal {-code} ({signal.strsignal(-code)})"
        if -code == signal.SIGKILL:
            reason += ", as the system does when memory runs out: scan it alone, or with fewer --jobs"
    else:
        reason = f"its process ended with exit code {code} and no result: scan it alone to see why"
    return error_result(checkpoint, None, reason, end.seconds)


def _in_one_line(error: Exception, checkpoint: Checkpoint) -> str:
    """The text of an error without the absolute path, which reports must not hold."""
    if isinstance(error, CheckpointError):
        part = os.path.relpath(error.path, checkpoint.path)
        text = error.reason if part == "." else f"{part}: {error.reason}"
    else:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return text.replace(os.fspath(checkpoint.path), checkpoint.name)
