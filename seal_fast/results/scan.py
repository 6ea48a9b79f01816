"""What a scan found. `seal_fast.workflows.scan` makes it; reports only read it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from seal_fast.diffusion import ModelFamily
from seal_fast.noise_triggers import Evidence, NoiseScope, TriedCandidate
from seal_fast.text_triggers.findings import FoundTrigger, TextEvidence, TextScope, TriedText
from seal_fast.verdict import Verdict

DetectorName = Literal["noise", "text"]
"""Noise triggers of unconditional models, or text triggers of text-to-image models."""

RESUMED = "resumed from an earlier scan: same model, settings and version"
"""Note of a result that a scan took over instead of making it again."""


@dataclass(frozen=True)
class ModelResult:
    """What a scan found in one model.

    Attributes:
        path: path of the checkpoint, relative to the scanned root, with forward slashes.
        detector: the kind of triggers that it was scanned for; None if its files do not say which kind of model it is.
        sha256: digest of the weight files; None if they could not be read.
        format: name of the on-disk format; None if it could not be read.
        family: the model's noise process and prediction; None if it could not be loaded.
        verdict: clean, backdoored, inconclusive or error.
        rule: code of the rule that decided (`RULES` of `seal_fast.noise_triggers.verdict` or of
            `seal_fast.text_triggers.verdict`); None for an error.
        score: what was compared with `threshold`; None if the decision does not rest on a score.
        threshold: a greater score means backdoored; None without a score.
        reason: the grounds of the verdict, or the error, as a sentence.
        scope: what was looked for; the verdict says nothing of anything else. None after an error.
        evidence: the statistics that the verdict rests on; None after an error.
        trigger: path of the trigger file, relative to the output folder; None if none was kept.
        seconds: wall time spent on the model.
        error: what went wrong; None unless the verdict is error.
        found: confirmed text triggers, the strongest first; the trigger file holds a recovered noise trigger.
        candidates: every candidate that the search tested, in order, and why the search ended with it or left it; empty for
            the published preset.
        notes: assumptions that the loader made, and remarks of the scan.
        config_sha256: digest of what the checkpoint says beside its weights and of what else its verdict
            rests on beside the settings of the scan (a base, prompts); None after an error.
    """

    path: str
    detector: DetectorName | None
    sha256: str | None
    format: str | None
    family: ModelFamily | None
    verdict: Verdict
    rule: str | None
    score: float | None
    threshold: float | None
    reason: str
    scope: NoiseScope | TextScope | None
    evidence: Evidence | TextEvidence | None
    trigger: str | None
    seconds: float
    error: str | None
    found: tuple[FoundTrigger, ...] = ()
    candidates: tuple[TriedCandidate | TriedText, ...] = ()
    notes: tuple[str, ...] = ()
    config_sha256: str | None = None

    @property
    def resumed(self) -> bool:
        """Whether an earlier scan made this result."""
        return RESUMED in self.notes


@dataclass(frozen=True)
class ScanReport:
    """All models of a scan, in the order they were found.

    Attributes:
        models: one result each.
        tool: name and version of seal-fast.
        environment: the machine and the libraries.
        config: settings, calibration, seed and device that the verdicts rest on.
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
