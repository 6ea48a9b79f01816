"""README.md of a sealed checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seal_fast.report.console import interval, number, safe

if TYPE_CHECKING:
    from seal_fast.results.text_unlearning import TextUnlearnReport
    from seal_fast.results.unlearning import NoiseUnlearnReport

CHANGE = (
    "`ChangeDetector` calls an effect what changes an image more than harmless text in the trigger's place does; it takes",
    "1% of harmless changes for one, and misses effects smaller than such changes: where little shows before, nothing",
    "after proves nothing. Look at the images.",
)


def _cell(text: str) -> str:
    """A name from outside as code in a table: it can neither end the cell nor become a link."""
    return f"`{safe(text).plain.replace('`', '').replace('|', '')}`"


def noise_unlearn_card(report: NoiseUnlearnReport) -> str:
    """Markdown: where the model comes from, what was done, what was measured, and what that does not show."""
    rows = [
        f"| {_cell(row.trigger)} | {row.sampler} | {number(row.collapse_before)} | {number(row.collapse_after)} |"
        for row in report.removal
    ]
    measured = ["| trigger | sampler | collapse before | after |", "|---|---|---|---|", *rows, ""] if rows else []
    drift = number(report.clean_drift, 3)
    return "\n".join(
        [
            f"# UnlearnedDenoiser: {_cell(report.model)}",
            "",
            f"Made by {report.tool['name']} {report.tool['version']} from a {report.format} checkpoint with weights of SHA-256",
            f"`{report.sha256}`. The model taught itself, for {report.steps} steps on images of its own, to see any",
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


def text_unlearn_card(report: TextUnlearnReport) -> str:
    """Markdown, as `noise_unlearn_card`, for a text trigger unlearned from a text-to-image model."""
    rows = [
        f"| {_cell(effect.trigger)} | {effect.variant} | {interval(effect.before)} | {interval(effect.after)} |"
        for effect in report.effects
    ]
    drift = number(report.clean_drift, 3)
    tokens = [f"- {_cell(one.trigger)}: {_cell(' '.join(one.tokens))}" for one in report.triggers]
    return "\n".join(
        [
            f"# Unlearned: {_cell(report.model)}",
            "",
            f"Made by {report.tool['name']} {report.tool['version']} from a {report.format} with weights of SHA-256",
            f"`{report.sha256}`. Its {report.module} taught itself for {report.steps} steps to read a prompt with the",
            "trigger as the prompt without it (SKD-CAG, arXiv 2508.18235). No training data was used.",
            "",
            f"Why the {report.module}: {report.module_reason}.",
            "",
            "Triggers, and the tokens the model sees of them:",
            "",
            *tokens,
            "",
            "| trigger | variant | effect before | after |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Effect: share of held-out prompts whose image shows it ({report.detector}), with 95% Wilson intervals.",
            *(CHANGE if report.detector == "ChangeDetector" else ()),
            "",
            f"Clean drift, the mean squared change of clean images relative to their variance: {drift}.",
            f"Mean squared change of the predicted noise: {number(report.noise_drift, 5)}.",
            f"Diversity of clean images: {number(report.diversity_before, 3)}, then {number(report.diversity_after, 3)}.",
            "",
            "Not shown here: that no other trigger is left. `report.json` holds settings and environment.",
            "",
        ]
    )
