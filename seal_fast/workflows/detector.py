"""What a scan asks of a detector of noise triggers or text triggers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from seal_fast.diffusion import ModelFamily
from seal_fast.noise_triggers import Evidence, NoiseScope, TriedCandidate
from seal_fast.results.progress import OnProgress, Progress
from seal_fast.results.scan import DetectorName
from seal_fast.text_triggers.findings import FoundTrigger, TextEvidence, TextScope, TriedText
from seal_fast.verdict import Decision

M = TypeVar("M")
S = TypeVar("S")


@dataclass(frozen=True)
class Loaded(Generic[M]):
    """A model in memory.

    Attributes:
        model: what the detector searches.
        sha256: digest of the checkpoint's weight files.
        format: its on-disk format.
        family: its noise process and prediction.
        config_sha256: digest of everything else that the verdict rests on, beside the settings of the scan.
        notes: assumptions of the loader.
    """

    model: M
    sha256: str
    format: str
    family: ModelFamily
    config_sha256: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Findings:
    """What a search means.

    Attributes:
        decision: the verdict with its grounds.
        scope: what was looked for.
        evidence: the statistics that the verdict rests on.
        candidates: every candidate that was tested.
        found: confirmed text triggers.
    """

    decision: Decision
    scope: NoiseScope | TextScope
    evidence: Evidence | TextEvidence
    candidates: tuple[TriedCandidate | TriedText, ...]
    found: tuple[FoundTrigger, ...] = ()


class Detector(Protocol[M, S]):
    """Searches checkpoints of one kind for triggers. It pickles, so that a process of its own can use it.

    Attributes:
        name: the kind of triggers.
        config: settings that verdicts rest on, in JSON's types. A resumed scan must have the same.
    """

    @property
    def name(self) -> DetectorName: ...

    @property
    def config(self) -> dict[str, Any]: ...

    def accepts(self, path: Path) -> bool:
        """Whether the checkpoint is of the detector's kind, by names and configs only."""

    def load(self, path: Path, device: str) -> Loaded[M]:
        """Load a checkpoint without trusting it; CheckpointError if it is refused."""

    def search(self, loaded: Loaded[M], at: Progress, on_progress: OnProgress) -> S:
        """Search for triggers; `at` names the model and its number."""

    def findings(self, loaded: Loaded[M], search: S) -> Findings:
        """Decide."""

    def save_triggers(self, loaded: Loaded[M], search: S, folder: Path) -> str | None:
        """Write what was found, and return the name of the file in `folder`; None if there is nothing to write."""

    def save_images(self, loaded: Loaded[M], search: S, folder: Path) -> None:
        """Write images that show the triggers and their effects."""


def accepting(detectors: Sequence[Detector[Any, Any]], path: Path) -> Detector[Any, Any]:
    """The first detector that accepts the checkpoint; the last one if none does, whose loader then says what is wrong."""
    return next((detector for detector in detectors if detector.accepts(path)), detectors[-1])
