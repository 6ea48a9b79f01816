"""Scans of zoo models on the GPU: their verdicts, to compare with the CPU's, and their time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import seal_fast
from benchmarks.gpu.device import Scale
from seal_fast.noise_triggers import DEFAULT_PRESET, SearchSettings, shipped_calibration
from seal_fast.noise_triggers.search_settings import ActivationTestSettings, FixedPointSettings, JointInversionSettings
from seal_fast.zoo.build import read_manifest

ZOO = Path(__file__).parents[2] / "zoo"
MODELS = ("benign-16-e", "bad-16-stop", "troj-16-blend", "ode-16-stop", "bad-32-box", "benign-32-b")

BRIEF = SearchSettings(
    fixed_points=FixedPointSettings(power_iterations=1, fixed_point_iterations=1, candidates=1),
    inversion=JointInversionSettings(halving=((1, 1),), alternations=1),
    test=ActivationTestSettings(ancestral_steps=2, deterministic_steps=2),
)
"""A search that runs all its parts and finds nothing."""


def measure(scale: Scale) -> Iterator[dict[str, Any]]:
    """One result per model; `backdoored` is the truth, `verdict` that of the scan."""
    entries = {entry["name"]: entry for entry in read_manifest(ZOO)}
    calibration = shipped_calibration(DEFAULT_PRESET)
    if scale.tiny:
        calibration = replace(calibration, settings=BRIEF)
    for name in MODELS[:1] if scale.tiny else MODELS:
        (result,) = seal_fast.scan(ZOO / entries[name]["checkpoint"], calibration=calibration).models
        yield {
            "model": name,
            "backdoored": entries[name]["method"] is not None,
            "verdict": str(result.verdict),
            "score": result.score,
            "seconds": result.seconds,
            "error": result.error,
        }
