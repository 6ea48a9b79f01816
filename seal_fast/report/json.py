"""report.json, and JSON on stdout."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seal_fast.io import write_atomically

if TYPE_CHECKING:
    from seal_fast.results.plan import ScanPlan
    from seal_fast.results.prompt_detection import PromptReport
    from seal_fast.results.scan import ScanReport
    from seal_fast.results.text_unlearning import TextUnlearnReport
    from seal_fast.results.unlearning import NoiseUnlearnReport

SCHEMA_VERSION = 1
REPORT = "report.json"
"""Name of the report in the folder of `--out`."""


def read_report(folder: Path) -> str | None:
    """The text of the report in a folder; None if there is none that can be read. Opening a FIFO would wait for ever."""
    try:
        file = folder / REPORT
        return file.read_text(encoding="utf-8") if file.is_file() else None
    except (OSError, UnicodeDecodeError):
        return None


def _plain(value: Any) -> Any:
    """`value` in JSON's own types, NaN and infinities as null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(content: dict[str, Any]) -> str:
    """Indented JSON that any parser reads: ASCII, no NaN."""
    return json.dumps(_plain(content), indent=2, allow_nan=False)


def report_json(report: ScanReport) -> str:
    """The whole report as JSON."""
    return to_json(
        {
            "schema_version": SCHEMA_VERSION,
            "tool": report.tool,
            "environment": report.environment,
            "config": report.config,
            "models": [asdict(model) for model in report.models],
            "summary": report.summary,
        }
    )


def detection_json(log_ratios: Sequence[float], tool: dict[str, str]) -> str:
    """Input detection as JSON: the log ratio (nats) of every input, and whether it is triggered."""
    triggered = [value > 0 for value in log_ratios]
    summary = {"triggered": sum(triggered), "clean": len(triggered) - sum(triggered)}
    return to_json(
        {
            "schema_version": SCHEMA_VERSION,
            "tool": tool,
            "log_ratio": list(log_ratios),
            "triggered": triggered,
            "summary": summary,
        }
    )


def prompt_detection_json(report: PromptReport) -> str:
    """Prompt detection as JSON: every prompt with its verdict, its score and its most suspicious part."""
    return to_json({"schema_version": SCHEMA_VERSION, **asdict(report), "summary": report.summary})


def unlearn_json(report: NoiseUnlearnReport | TextUnlearnReport) -> str:
    """The report of an unlearning as JSON."""
    return to_json({"schema_version": SCHEMA_VERSION, **asdict(report)})


def plan_json(plan: ScanPlan) -> str:
    """The plan of a dry run as JSON."""
    return to_json({"schema_version": SCHEMA_VERSION, **asdict(plan)})


def write_report(report: ScanReport, path: Path) -> None:
    """Write `report_json` to `path`; the file is replaced whole."""
    content = report_json(report) + "\n"
    write_atomically(path, lambda partial: partial.write_text(content, encoding="utf-8"))
