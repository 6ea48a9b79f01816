"""Resume a scan: take over the results of an earlier one that a new scan would only repeat.

A result is taken over if everything that its verdict rests on is unchanged: the version of seal-fast, seed and device, the
settings of its detector (all of them in the report's `tool` and `config`), the weights, the rest of the checkpoint, and what
else its detector uses (as digests in the result).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from seal_fast.checkpoints import CheckpointError
from seal_fast.report.json import read_report, to_json
from seal_fast.results.scan import RESUMED, ModelResult
from seal_fast.typed_json import from_json
from seal_fast.verdict import Verdict
from seal_fast.workflows.detector import Detector, accepting
from seal_fast.workflows.discovery import Checkpoint


def resumed_results(
    out: Path,
    checkpoints: Sequence[Checkpoint],
    detectors: Sequence[Detector[Any, Any]],
    tool: dict[str, str],
    config: dict[str, Any],
) -> dict[int, ModelResult]:
    """Results in `out`/report.json that a new scan would only repeat.

    Args:
        out: folder of the earlier scan; it need not have a report.
        checkpoints: what the new scan found.
        detectors: those of the new scan.
        tool: name and version of seal-fast; a report of another version is ignored.
        config: configuration of the new scan.

    Returns:
        Place in `checkpoints` to result, for models with the same name and digests whose detector has the same settings.
        Errors, and results whose trigger file is missing, are left out, so that these models are scanned again.
    """
    text = read_report(out)
    if text is None:
        return {}
    try:
        content = json.loads(text)
        if content["tool"] != tool:
            return {}
        earlier = {result.path: result for fields in content["models"] if (result := _result(fields))}
        unchanged = {
            detector.name for detector in detectors if _settings(content["config"], detector) == _settings(config, detector)
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
    return {
        place: replace(result, notes=(*(note for note in result.notes if note != RESUMED), RESUMED))
        for place, checkpoint in enumerate(checkpoints)
        if (result := earlier.get(checkpoint.name))
        and result.detector in unchanged
        and _still_holds(result, out, checkpoint, detectors)
    }


def _settings(config: dict[str, Any], detector: Detector[Any, Any]) -> dict[str, Any]:
    """What the results of a detector rest on, as report.json has it."""
    settings: dict[str, Any] = json.loads(to_json({name: config[name] for name in ("seed", "device", detector.name)}))
    return settings


def _result(fields: Any) -> ModelResult | None:
    """A result as report.json has it; None if it is none."""
    try:
        return from_json(ModelResult, fields)
    except ValueError:
        return None


def _still_holds(result: ModelResult, out: Path, checkpoint: Checkpoint, detectors: Sequence[Detector[Any, Any]]) -> bool:
    detector = accepting(detectors, checkpoint.path)
    if result.verdict is Verdict.ERROR or detector.name != result.detector:
        return False
    try:
        if result.trigger is not None and not (out / result.trigger).is_file():
            return False
        loaded = detector.load(checkpoint.path, "cpu")
    except (CheckpointError, MemoryError, RuntimeError, OSError):
        return False
    return (loaded.sha256, loaded.config_sha256) == (result.sha256, result.config_sha256)
