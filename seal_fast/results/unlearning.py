"""The report of an unlearning. Made by `seal_fast.workflows`; reports only read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class UnlearnRun:
    """Which model was unlearned, on what, and at what cost.

    Attributes:
        model: name of the checkpoint; for a model in memory, of its class.
        seconds: wall time, including loading and measuring.
        training_seconds: wall time of the training alone.
        peak_memory_bytes: peak memory of the GPU if one was used, else of the process.
        tool: name and version.
        environment: the machine and the libraries.
    """

    model: str
    seconds: float
    training_seconds: float
    peak_memory_bytes: int
    tool: dict[str, str]
    environment: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class UnlearnReport(UnlearnRun):
    """What every report of an unlearning holds.

    Attributes:
        sha256: digest of the weights; None for a model in memory.
        format: the checkpoint's format; "pipeline" or "denoiser" for a model in memory.
        steps: training steps.
        config: settings, seed, device, and the size of the evaluation.
        notes: remarks of the loader.
    """

    sha256: str | None
    format: str
    steps: int
    config: dict[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class NoiseTriggerEffect:
    """Diversity collapse by one trigger under one sampler: how many times less samples vary with the trigger than without.

    Attributes:
        trigger: name of its file, or its number if it came without one.
        sampler: name of the sampler, a key of `seal_fast.noise_triggers.evaluation.TriggerSamples.triggered`.
        collapse_before: diversity collapse in the poisoned model; large if samples from all noises become one image.
        collapse_after: diversity collapse in the unlearned model.
    """

    trigger: str
    sampler: str
    collapse_before: float
    collapse_after: float


@dataclass(frozen=True, kw_only=True)
class NoiseUnlearnReport(UnlearnReport):
    """How noise triggers were unlearned.

    Attributes:
        effects: one item per trigger and sampler.
        clean_drift: see `seal_fast.noise_triggers.evaluation.clean_drift`.
    """

    effects: tuple[NoiseTriggerEffect, ...]
    clean_drift: float
