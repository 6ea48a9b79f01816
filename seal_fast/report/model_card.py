"""README.md of a sealed checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seal_fast.report.console import number, safe

if TYPE_CHECKING:
    from seal_fast.scan.seal import SealReport


def _cell(text: str) -> str:
    """A name from outside as code in a table: it can neither end the cell nor become a link."""
    return f"`{safe(text).plain.replace('`', '').replace('|', '')}`"


def model_card(report: SealReport) -> str:
    """Markdown: where the model comes from, what was done, what was measured, and what that does not show."""
    rows = [
        f"| {_cell(row.trigger)} | {row.sampler} | {number(row.collapse_before)} | {number(row.collapse_after)} |"
        for row in report.removal
    ]
    measured = ["| trigger | sampler | collapse before | after |", "|---|---|---|---|", *rows, ""] if rows else []
    drift = number(report.clean_drift, 3)
    return "\n".join(
        [
            f"# Sealed: {_cell(report.model)}",
            "",
            f"Made by {report.tool['name']} {report.tool['version']} from a {report.format} checkpoint with weights of SHA-256",
            f"`{report.sha256}`. The model taught itself, for {report.steps} steps on pictures of its own, to see any",
            "shift of its starting noise as noise. No training data was used.",
            "",
            *measured,
            "Collapse is how many times more alike triggered samples are than clean ones: at 1 the trigger does nothing. It is",
            "a reverted one, so a small change says little if nothing collapsed before.",
            f"Clean drift, the mean squared change of clean samples relative to their variance: {drift}.",
            "",
            "Not shown here: that no other kind of backdoor is left. `report.json` holds settings and environment.",
            "",
        ]
    )
