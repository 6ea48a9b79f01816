"""What a scan found. Made by `seal_fast.workflows.scan`; reports only read it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from seal_fast.diffusion import ModelFamily
from seal_fast.noise_triggers import Evidence, Verdict


@dataclass(frozen=True)
class ModelResult:
    """One model's row.

    Attributes:
        path: of the checkpoint, relative to the scanned root, with forward slashes.
        sha256: of the weights file; None if it could not be read.
        format: name of the on-disk format; None if it could not be read.
        family: the model's noise process and prediction; None if it could not be loaded.
        verdict: clean, backdoored, inconclusive or error.
        rule: code of the rule that decided (`seal_fast.noise_triggers.verdict.RULES`); None for an error.
        score: what was compared with `threshold`; None if the decision does not rest on a score.
        threshold: a greater score means backdoored; None likewise.
        reason: the grounds of the verdict, or the error, as a sentence.
        evidence: statistics of the reverted trigger; None after an error.
        trigger: path of the reverted trigger relative to the output folder; None if none was kept.
        seconds: wall time spent on the model.
        error: what went wrong; None unless the verdict is error.
        notes: remarks of the loader, and of this run.
    """

    path: str
    sha256: str | None
    format: str | None
    family: ModelFamily | None
    verdict: Verdict
    rule: str | None
    score: float | None
    threshold: float | None
    reason: str
    evidence: Evidence | None
    trigger: str | None
    seconds: float
    error: str | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScanReport:
    """All models of a scan, in the order they were found.

    Attributes:
        models: one row each.
        tool: name and version.
        environment: the machine and the libraries.
        config: settings, calibration and seed that the verdicts rest on.
    """

    models: tuple[ModelResult, ...]
    tool: dict[str, str]
    environment: dict[str, Any]
    config: dict[str, Any]

    @property
    def summary(self) -> dict[str, int]:
        """How many models got each verdict."""
        counts = Counter(model.verdict for model in self.models)
        return {verdict.value: counts[verdict] for verdict in Verdict}
