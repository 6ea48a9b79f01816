"""README.md of an unlearned checkpoint."""

from __future__ import annotations

from seal_fast.report.console import detector_in_words, number, safe
from seal_fast.results.text_unlearning import TextUnlearnReport
from seal_fast.results.unlearning import NoiseUnlearnReport

CHANGE_DETECTOR = (
    "1% of the images with control text count, too, and effects smaller than theirs do not: where the rate before is low, the",
    "rate after shows nothing. Look at the images.",
)


def unlearn_card(report: NoiseUnlearnReport | TextUnlearnReport, original: str = "") -> str:
    """Markdown: where the model comes from, what was done, what was measured, and what the figures do not show.

    Args:
        report: the report of the unlearning.
        original: the model card of the checkpoint, which stays above all that.
    """
    above, mark = ([original.rstrip(), ""], "##") if original.strip() else ([], "#")
    body = _noise_trigger_lines(report) if isinstance(report, NoiseUnlearnReport) else _text_trigger_lines(report)
    return "\n".join(
        [
            *above,
            f"{mark} Unlearned: {_code(report.model)}",
            "",
            f"Made by {report.tool['name']} {report.tool['version']} from a {report.format} with weights of SHA-256",
            f"`{report.sha256}`.",
            "",
            *body,
            "",
            "The figures do not show that the model has no other backdoor. `report.json` holds settings and environment.",
            "",
        ]
    )


def _code(text: str) -> str:
    """A name from outside as code in a table: it can neither end the cell nor become a link."""
    return f"`{safe(text).plain.replace('`', '').replace('|', '')}`"


def _noise_trigger_lines(report: NoiseUnlearnReport) -> list[str]:
    rows = [
        f"| {_code(effect.trigger)} | {effect.sampler} | {number(effect.collapse_before)} | {number(effect.collapse_after)} |"
        for effect in report.effects
    ]
    effects = [
        "| trigger | sampler | diversity collapse before | after |",
        "|---|---|---|---|",
        *rows,
        "",
        "Diversity collapse: how many times less the samples vary with the trigger than without it. Near 1 the trigger does",
        "nothing. The trigger was recovered by a search and is not exactly the attacker's: where samples did not collapse",
        "before, the figure after shows nothing.",
        "",
    ]
    return [
        f"The poisoned model trained its own copy, for {report.steps} steps on images that it drew, to take any shift of the",
        "starting noise for noise. No training data was used.",
        "",
        *(effects if rows else []),
        f"Clean drift, the mean squared change of clean samples relative to their variance: {number(report.clean_drift, 3)}.",
    ]


def _text_trigger_lines(report: TextUnlearnReport) -> list[str]:
    rows = [f"| {_code(effect.trigger)} | {effect.variant} | {effect.before} | {effect.after} |" for effect in report.effects]
    return [
        f"Its {report.module} was trained for {report.steps} steps to read a prompt with the trigger as the prompt without it",
        "(SKD-CAG, arXiv 2508.18235); the poisoned model was the teacher. No training data was used.",
        "",
        f"Why the {report.module}: {report.module_reason}.",
        "",
        "Triggers, and the tokens that the model reads:",
        "",
        *(f"- {_code(one.trigger)}: {_code(' '.join(one.tokens))}" for one in report.triggers),
        "",
        "| trigger | variant | effect before | after |",
        "|---|---|---|---|",
        *rows,
        "",
        f"Effect: share of held-out prompts whose image {detector_in_words(report.detector)},",
        "with 95% Wilson intervals.",
        *(CHANGE_DETECTOR if report.detector == "ChangeDetector" else ()),
        "",
        f"Clean drift, the mean squared change of clean images relative to their variance: {number(report.clean_drift, 3)}.",
        f"Mean squared change of the predicted noise: {number(report.noise_drift, 5)}.",
        f"Diversity of clean images: {number(report.diversity_before, 3)} before, {number(report.diversity_after, 3)} after.",
    ]
