"""Resume a scan: take over the results of an earlier one that a new scan would only repeat.

A result is taken over if everything that its verdict rests on is unchanged: the version of seal-fast, every setting of the
reversion, the calibration, seed and device (all of them in the report's `tool` and `config`), the weights and the rest of the
checkpoint (both as digests in the result).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from seal_fast.checkpoints import CheckpointError, load_denoiser
from seal_fast.diffusion import Denoiser, ModelFamily
from seal_fast.noise_triggers import Evidence, TriedCandidate
from seal_fast.report.json import to_json
from seal_fast.results.scan import RESUMED, ModelResult
from seal_fast.verdict import Verdict
from seal_fast.workflows.discovery import Checkpoint


def resumed_results(
    out: Path, checkpoints: Sequence[Checkpoint], tool: dict[str, str], config: dict[str, Any]
) -> dict[int, ModelResult]:
    """Results in `out`/report.json that a new scan would only repeat.

    Args:
        out: folder of the earlier scan; it need not have a report.
        checkpoints: what the new scan found.
        tool: name and version of seal-fast; a report of another version is ignored.
        config: configuration of the new scan; a report with another one is ignored.

    Returns:
        Place in `checkpoints` to result, for models with the same name and digests. Errors, and results whose trigger file is
        missing, are left out, so that these models are scanned again.
    """
    try:
        content = json.loads((out / "report.json").read_text(encoding="utf-8"))
        if {"tool": content["tool"], "config": content["config"]} != json.loads(to_json({"tool": tool, "config": config})):
            return {}
        earlier = {result.path: result for result in map(_result, content["models"])}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return {
        place: replace(result, notes=(*(note for note in result.notes if note != RESUMED), RESUMED))
        for place, checkpoint in enumerate(checkpoints)
        if (result := earlier.get(checkpoint.name)) and _still_holds(result, out, checkpoint, config["weights"])
    }


def config_digest(denoiser: Denoiser) -> str:
    """SHA-256 of what a checkpoint says besides its weights: structure of the network, noise process and value range."""
    process = denoiser.process
    structure = {key: value for key, value in dict(getattr(denoiser.network, "config", {})).items() if not key.startswith("_")}
    described = [structure, str(denoiser.family), process.signal.tolist(), process.noise.tolist(), denoiser.value_range]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _result(fields: dict[str, Any]) -> ModelResult:
    """A result as report.json has it."""
    typed = {
        "family": fields["family"] and ModelFamily(**fields["family"]),
        "verdict": Verdict(fields["verdict"]),
        "evidence": fields["evidence"] and Evidence(**fields["evidence"]),
        "candidates": tuple(TriedCandidate(**candidate) for candidate in fields["candidates"]),
        "notes": tuple(fields["notes"]),
    }
    return ModelResult(**{**fields, **typed})


def _still_holds(result: ModelResult, out: Path, checkpoint: Checkpoint, weights: str) -> bool:
    if result.verdict is Verdict.ERROR or (result.trigger is not None and not (out / result.trigger).is_file()):
        return False
    try:
        loaded = load_denoiser(checkpoint.path, weights=weights)
    except (CheckpointError, MemoryError, RuntimeError):
        return False
    return (loaded.sha256, config_digest(loaded.denoiser)) == (result.sha256, result.config_sha256)
