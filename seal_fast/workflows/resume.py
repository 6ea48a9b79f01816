"""Rows of an earlier scan that still hold, so that a killed one goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from seal_fast.checkpoints import CheckpointError, load_denoiser
from seal_fast.diffusion import ModelFamily
from seal_fast.noise_triggers import Evidence, Verdict
from seal_fast.report.json import to_json
from seal_fast.results.progress import RESUMED
from seal_fast.results.scan import ModelResult
from seal_fast.workflows.discovery import Candidate


def resumed_results(
    out: Path, candidates: Sequence[Candidate], tool: dict[str, str], config: dict[str, Any]
) -> dict[int, ModelResult]:
    """Rows of `out`/report.json that a new scan would only repeat.

    Args:
        out: folder of the earlier scan; it need not have a report.
        candidates: checkpoints to scan.
        tool: name and version; a report of another version counts for nothing.
        config: what verdicts rest on; a report with another counts for nothing.

    Returns:
        Place in `candidates` to row, for models of the same name whose weights have the same SHA-256, unless the row is an
        error or its trigger is gone.
    """
    try:
        content = json.loads((out / "report.json").read_text(encoding="utf-8"))
        if {"tool": content["tool"], "config": content["config"]} != json.loads(to_json({"tool": tool, "config": config})):
            return {}
        rows = {row.path: row for row in map(_row, content["models"])}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return {
        place: replace(row, notes=(*(note for note in row.notes if note != RESUMED), RESUMED))
        for place, candidate in enumerate(candidates)
        if (row := rows.get(candidate.name)) and _holds(row, out, candidate, config["weights"])
    }


def _row(fields: dict[str, Any]) -> ModelResult:
    typed = {
        "family": fields["family"] and ModelFamily(**fields["family"]),
        "verdict": Verdict(fields["verdict"]),
        "evidence": fields["evidence"] and Evidence(**fields["evidence"]),
        "notes": tuple(fields["notes"]),
    }
    return ModelResult(**{**fields, **typed})


def _holds(row: ModelResult, out: Path, candidate: Candidate, weights: str) -> bool:
    if row.verdict is Verdict.ERROR or (row.trigger is not None and not (out / row.trigger).is_file()):
        return False
    try:
        return load_denoiser(candidate.path, weights=weights).sha256 == row.sha256
    except (CheckpointError, MemoryError, RuntimeError):
        return False
