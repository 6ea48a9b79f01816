"""What a sealing did. Made by `seal_fast.workflows.unlearn_noise`; reports only read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class UnlearnRun:
    """What the report of any sealing says of the model and the run.

    Attributes:
        model: name of the checkpoint; the class of a pipeline that was given in memory.
        sha256: of the weights; None for a pipeline that was given.
        format: as the loader identifies it; "pipeline" for one that was given.
        steps: of training.
        seconds: wall time, with loading and measuring.
        training_seconds: wall time of the training alone.
        peak_memory_bytes: of the device where it is a GPU, else of the process.
        tool: name and version.
        environment: the machine and the libraries.
        config: settings, seed, device, and what was measured on.
        notes: remarks of the loader.
    """

    model: str
    sha256: str | None
    format: str
    steps: int
    seconds: float
    training_seconds: float
    peak_memory_bytes: int
    tool: dict[str, str]
    environment: dict[str, Any]
    config: dict[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Removal:
    """One trigger before and after.

    Attributes:
        trigger: name of its file.
        sampler: a key of `seal_fast.noise_triggers.evaluation.draw_starts`.
        collapse_before: of the model as it was; large means one image for every noise.
        collapse_after: of the sealed model.
    """

    trigger: str
    sampler: str
    collapse_before: float
    collapse_after: float


@dataclass(frozen=True, kw_only=True)
class NoiseUnlearnReport(UnlearnRun):
    """What the sealing of a noise-space backdoor did.

    Attributes:
        removal: two rows per trigger.
        clean_drift: see `seal_fast.noise_triggers.evaluation.clean_drift`.
    """

    removal: tuple[Removal, ...]
    clean_drift: float
