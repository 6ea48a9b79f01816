"""Results for people: tables and sentences that fit the console."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from seal_fast.noise_triggers.calibration import group_of
from seal_fast.printable import printable
from seal_fast.report.table import Line, print_sentence, print_table
from seal_fast.text_triggers.trigger import PLACES

if TYPE_CHECKING:
    from seal_fast.noise_triggers import Calibration, CalibrationModel
    from seal_fast.results.plan import ScanPlan
    from seal_fast.results.prompt_detection import PromptReport
    from seal_fast.results.scan import ModelResult, ScanReport
    from seal_fast.results.text_unlearning import TextUnlearnReport
    from seal_fast.results.unlearning import NoiseUnlearnReport
    from seal_fast.verdict import Decision, Verdict

UNKNOWN_WIDTH = 80
CODE_POINTS = 8
"""Code points beyond ASCII that a line shows of a trigger."""
ALSO = 8
"""Other texts that a line shows."""

DETECTORS = {
    "ChangeDetector": "the trigger changes more than control text in its place does",
    "ColourlessDetector": "is black and white",
    "PatchDetector": "shows the given patch",
}
"""What the effect detectors of the command line see, by the names of their classes."""

STYLES = {"clean": "green", "backdoored": "bold red", "inconclusive": "yellow", "error": "magenta"}
PROMPT_STYLES = {"triggered": "bold red", "clean": "green", "familiar": ""}


def safe(text: str, style: str = "") -> Text:
    """A text that comes from a checkpoint or its name, without markup and without anything that could control the terminal."""
    return Text(printable(text), style)


def console_for(stream: IO[str]) -> Console:
    """A console that writes to `stream`, without colour where it is no terminal or NO_COLOR is set."""
    console = _Console(file=stream, highlight=False, markup=False, emoji=False)
    # rich prints nothing at all where COLUMNS=0 says that the width is not known
    if not console.width:
        console.width = UNKNOWN_WIDTH
    return console


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError. Rich would exit with 1, which means "backdoored" here."""
        raise


def number(value: float | None, digits: int = 2) -> str:
    """A number short enough for a column; "-" for none."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.{digits}e}"


def _score(model: ModelResult) -> str:
    """Score and the threshold above which it means backdoored."""
    return "-" if model.score is None else f"{number(model.score)} / {number(model.threshold)}"


def _verdict(verdict: Verdict) -> Text:
    """A verdict in its colour."""
    return Text(verdict.value, STYLES[verdict.value])


def _code_points(text: str) -> str:
    """The first code points of a text beyond ASCII, in brackets; "" if there are none."""
    points = [f"U+{ord(character):04X}" for character in text if not character.isascii()]
    return f" ({', '.join(points[:CODE_POINTS])}{', ...' if len(points) > CODE_POINTS else ''})" if points else ""


def _trigger_lines(model: ModelResult) -> Iterator[str]:
    """A line per confirmed text trigger, and one of what else activates its backdoor."""
    for found in model.found:
        effect = f"changes {found.effect} of {found.images}, control strings {found.control}"
        named = f"{found.trigger.quoted}{_code_points(found.trigger.text)}"
        yield f"{named} {PLACES[found.position]}: {effect}; {found.module.replace('_', ' ')}"
        if found.also:
            texts = "', '".join(found.also[:ALSO])
            more = f" and {len(found.also) - ALSO} more" if len(found.also) > ALSO else ""
            yield f"also activated by '{texts}'{more}"


def print_report(report: ScanReport, console: Console) -> None:
    """Verdict, name and score of every model, with the reason below; then the counts."""
    columns = ("verdict", "model", "score / limit", "seconds")
    lines = []
    for model in report.models:
        cells = (_verdict(model.verdict), safe(model.path), _score(model), number(model.seconds, 1))
        lines.append(Line(cells, tuple(map(printable, (model.reason, *_trigger_lines(model))))))
    if lines:
        print_table(console, columns, lines, folded="model", numbers=columns[2:])
    counts = ", ".join(f"{count} {verdict}" for verdict, count in report.summary.items())
    print_sentence(console, f"{len(lines)} model{'' if len(lines) == 1 else 's'}: {counts}")


def print_plan(plan: ScanPlan, console: Console) -> None:
    """UNet evaluations and predicted time of every search, with its stages below; then what was not planned."""
    columns = ("model", "evaluations", "predicted time")
    lines = []
    for search in plan.searches:
        cells = (safe(search.path), "-" if search.evaluations is None else f"{search.evaluations:,}", duration(search.seconds))
        stages = ", ".join(f"{stage.name} {stage.evaluations:,}" for stage in search.stages)
        lines.append(Line(cells, (printable(search.error or f"at most: {stages}"),)))
    if lines:
        print_table(console, columns, lines, folded="model", numbers=columns[1:])
        print_sentence(console, "evaluations: latents through the UNet; one measured batch predicts the time")
    if plan.others:
        print_sentence(console, f"{plan.others} other model{'' if plan.others == 1 else 's'}: no text-to-image, not planned")
    print_sentence(console, "dry run: nothing was searched")


def duration(seconds: float | None) -> str:
    """A time in its largest fitting unit; "-" for none."""
    if seconds is None:
        return "-"
    unit, size = next(((unit, size) for unit, size in (("h", 3600), ("min", 60)) if seconds >= 2 * size), ("s", 1))
    return f"{seconds / size:.1f} {unit}"


def print_detection(log_ratios: Sequence[float], console: Console) -> None:
    """Verdict and log ratio of every input, then the counts."""
    columns = ("verdict", "input", "log ratio")
    lines = []
    for place, value in enumerate(log_ratios):
        verdict = Text("triggered", "bold red") if value > 0 else Text("clean", "green")
        lines.append(Line((verdict, str(place), number(value))))
    print_table(console, columns, lines, folded="input", numbers=columns[1:])
    print_sentence(console, "log ratio: above 0, an input is more likely with the trigger than as clean noise")
    triggered = sum(value > 0 for value in log_ratios)
    print_sentence(console, f"{len(log_ratios)} inputs: {triggered} triggered, {len(log_ratios) - triggered} clean")


def print_prompt_detection(report: PromptReport, console: Console) -> None:
    """Verdict, text and score of every prompt, with the suspected part below; then what the verdicts mean, and the counts."""
    columns = ("verdict", "prompt", "score / limit")
    lines = []
    for one in report.prompts:
        suspected = f"suspected: '{printable(one.part)}'{_code_points(one.part)}"
        notes = [suspected] * one.triggered + ["the model reads only the beginning"] * one.cut
        score = "-" if one.score is None else f"{number(one.score)} / {number(one.threshold)}"
        verdict = Text(one.verdict.value, PROMPT_STYLES[one.verdict.value])
        lines.append(Line((verdict, safe(one.prompt), score), tuple(notes)))
    print_table(console, columns, lines, folded="prompt", numbers=columns[2:])
    print_sentence(console, "score: deviations of the most suspicious part from harmless ones of its kind")
    if report.summary["familiar"]:
        print_sentence(console, "familiar: clean prompts hold all words and pairs of words, so nothing was measured")
    counts = ", ".join(f"{count} {verdict}" for verdict, count in report.summary.items())
    share = f"{report.false_alarm_rate:.0%} of harmless prompts may count as triggered"
    print_sentence(console, f"{len(report.prompts)} prompt{'' if len(report.prompts) == 1 else 's'}: {counts} ({share})")


def detector_in_words(name: str) -> str:
    """What an effect detector sees in an image, as the end of a sentence about the image; `name` is that of its class."""
    return DETECTORS.get(name, f"shows the trigger's effect according to {name}")


def _clean_drift(value: float) -> str:
    """Clean drift with the ends of its scale."""
    return f"clean drift {number(value, 3)} (0: unchanged, 2: unrelated images)"


def print_noise_unlearning(report: NoiseUnlearnReport, console: Console) -> None:
    """Diversity collapse per trigger and sampler, before and after, and the effect on clean samples."""
    lines = [
        Line((safe(item.trigger), item.sampler, number(item.collapse_before), number(item.collapse_after)))
        for item in report.effects
    ]
    if lines:
        columns = ("trigger", "sampler", "collapse before", "after")
        print_table(console, columns, lines, folded="trigger", numbers=columns[2:])
        meaning = "how many times less samples vary with the trigger than without; at 1 or below, the trigger does nothing"
        print_sentence(console, f"diversity collapse: {meaning}")
    print_sentence(
        console,
        f"{_clean_drift(report.clean_drift)}, {report.steps} steps, {number(report.seconds, 1)} s",
    )


def print_text_unlearning(report: TextUnlearnReport, console: Console) -> None:
    """Effect per trigger and variant, before and after; then what was trained, and the effect on clean images."""
    lines = [Line((safe(item.trigger), item.variant, str(item.before), str(item.after))) for item in report.effects]
    columns = ("trigger", "variant", "effect before", "after")
    print_table(console, columns, lines, folded="trigger", numbers=columns[2:])
    print_sentence(
        console,
        f"effect: share of held-out prompts whose image {detector_in_words(report.detector)}, with 95% Wilson intervals",
    )
    for trigger in report.triggers:
        print_sentence(console, safe(f"tokens of {trigger.trigger!r}: {' '.join(trigger.tokens)}").plain)
    print_sentence(console, f"trained: {report.module} ({report.module_reason})")
    print_sentence(
        console,
        f"{_clean_drift(report.clean_drift)}, diversity {number(report.diversity_before, 3)} to "
        f"{number(report.diversity_after, 3)}, {report.steps} steps, {number(report.seconds, 1)} s",
    )


def evidence_line(model: CalibrationModel, features: Sequence[str]) -> str:
    """A calibration model's label and features."""
    values = ", ".join(f"{name} {number(getattr(model.evidence, name), 4)}" for name in features)
    return f"{model.name}: {'backdoored' if model.backdoored else 'benign'}, {values}"


def print_calibration(
    calibration: Calibration, left_out: Sequence[tuple[CalibrationModel, Decision]], console: Console
) -> None:
    """Per group of models that compare, the limits, and label, features and leave-one-out verdict of every model."""
    verdicts = {model.name: _verdict(decision.verdict) for model, decision in left_out}
    features = calibration.settings.features
    for group, pool in calibration.pools.items():
        limits = " or ".join(f"{name} exceeds {number(limit, 4)}" for name, limit in pool.limits.items())
        rule = "the classifier's probability exceeds 0.5" if pool.labelled else limits
        print_sentence(console, safe(f"{group}: a model is backdoored if {rule}").plain)
        lines = [
            Line(
                (
                    safe(model.name),
                    "backdoored" if model.backdoored else "benign",
                    *(number(getattr(model.evidence, name), 4) for name in features),
                    verdicts.get(model.name, "-"),
                )
            )
            for model in calibration.models
            if group_of(calibration.settings, model.family, model.shape) == group
        ]
        columns = ("model", "label", *features, "leave-one-out")
        print_table(console, columns, lines, folded="model", numbers=features)
        console.print()
    print_sentence(console, "leave-one-out: verdict on a benign model by the calibration without it")
