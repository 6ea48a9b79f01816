"""Scan one model: load the checkpoint, search for triggers, decide on a verdict, record triggers and images."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seal_fast.results.progress import OnProgress, Progress
from seal_fast.results.scan import DetectorName, ModelResult
from seal_fast.verdict import Verdict
from seal_fast.workflows.capacity import default_device
from seal_fast.workflows.detector import Detector, Loaded, accepting
from seal_fast.workflows.discovery import Checkpoint
from seal_fast.workflows.error_text import in_one_line
from seal_fast.workflows.processes import Died

Task = tuple[int, Checkpoint]
"""A checkpoint with its place in the report, from 0."""


@dataclass(frozen=True)
class ModelScan:
    """Scans one model when it is called. It pickles, so that a process of its own can call it.

    Attributes:
        detectors: the first one that accepts a model scans it.
        out: folder for triggers and images; None keeps none.
        total: number of models in the whole scan, for progress.
    """

    detectors: tuple[Detector[Any, Any], ...]
    out: Path | None
    total: int

    def __call__(self, task: Task, on_progress: OnProgress) -> ModelResult:
        """The result of one model; any exception on the way to the verdict becomes an `error` result."""
        started = time.perf_counter()
        place, checkpoint = task
        at = Progress(checkpoint.name, place + 1, self.total, "loading")
        on_progress(at)
        detector = accepting(self.detectors, checkpoint.path)
        loaded = None
        try:
            loaded = detector.load(checkpoint.path, default_device())
            search = detector.search(loaded, at, on_progress)
            findings = detector.findings(loaded, search)
        except Exception as error:
            reason = in_one_line(error, checkpoint)
            return error_result(checkpoint, detector.name, loaded, reason, time.perf_counter() - started)
        on_progress(replace(at, stage="images", fraction=1.0))
        trigger, notes = self._record(checkpoint, detector, loaded, search)
        decision = findings.decision
        return ModelResult(
            path=checkpoint.name,
            detector=detector.name,
            sha256=loaded.sha256,
            format=loaded.format,
            family=loaded.family,
            verdict=decision.verdict,
            rule=decision.rule,
            score=decision.score,
            threshold=decision.threshold,
            reason=decision.reason,
            scope=findings.scope,
            evidence=findings.evidence,
            trigger=trigger,
            seconds=time.perf_counter() - started,
            error=None,
            found=findings.found,
            candidates=findings.candidates,
            notes=(*loaded.notes, *notes),
            config_sha256=loaded.config_sha256,
        )

    def _record(
        self, checkpoint: Checkpoint, detector: Detector[Any, Any], loaded: Loaded[Any], search: Any
    ) -> tuple[str | None, tuple[str, ...]]:
        """Write triggers and their images; returns the path of the trigger file relative to `out`, and notes."""
        if self.out is None:
            return None, ()
        folder, kept = self.out / checkpoint.name, None
        try:
            if name := detector.save_triggers(loaded, search, folder):
                kept = f"{checkpoint.name}/{name}"
            detector.save_images(loaded, search, folder)
        except Exception as error:
            # the verdict stands without its images, and a full disk must not hide a backdoor
            return kept, (f"trigger or images not kept: {in_one_line(error, checkpoint)}",)
        return kept, ()


def error_result(
    checkpoint: Checkpoint, detector: DetectorName, loaded: Loaded[Any] | None, reason: str, seconds: float
) -> ModelResult:
    """The result of a model that could not be scanned; `loaded` is None if it could not be loaded."""
    return ModelResult(
        path=checkpoint.name,
        detector=detector,
        sha256=loaded.sha256 if loaded else None,
        format=loaded.format if loaded else None,
        family=loaded.family if loaded else None,
        verdict=Verdict.ERROR,
        rule=None,
        score=None,
        threshold=None,
        reason=reason,
        scope=None,
        evidence=None,
        trigger=None,
        seconds=seconds,
        error=reason,
    )


def lost_result(checkpoint: Checkpoint, detector: DetectorName, end: Died) -> ModelResult:
    """The result of a model whose process ended without one."""
    code = end.exit_code
    if code is not None and code < 0:
        reason = f"its process was killed by signal {-code} ({signal.strsignal(-code)})"
        if -code == signal.SIGKILL:
            reason += ", as the system does when memory runs out: scan it alone, or with fewer --jobs"
    else:
        reason = f"its process ended with exit code {code} and no result: scan it alone to see why"
    return error_result(checkpoint, detector, None, reason, end.seconds)
