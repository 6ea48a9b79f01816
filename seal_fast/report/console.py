"""Results as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from seal_fast.noise_triggers import Calibration, CalibrationModel, Decision
    from seal_fast.results.scan import ModelResult, ScanReport
    from seal_fast.results.text_unlearning import TextUnlearnReport
    from seal_fast.results.unlearning import NoiseUnlearnReport
    from seal_fast.text_triggers.rate import Rate

STYLES = {"clean": "green", "backdoored": "bold red", "inconclusive": "yellow", "error": "magenta"}


def safe(text: str, style: str = "") -> Text:
    """Text that came from a checkpoint or its name: no markup, and nothing that could steer the terminal."""
    return Text("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text), style)


def console_for(stream: IO[str]) -> Console:
    """A console that writes to `stream`, without colour where it is no terminal or NO_COLOR is set."""
    return Console(file=stream, highlight=False, markup=False, emoji=False)


def table_of(*columns: str, numbers: Iterable[str] = (), whole: Iterable[str] = ()) -> Table:
    """A plain table: columns in `numbers` align right and, like those in `whole`, are never broken or cut."""
    numbers, whole = set(numbers), set(whole)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for column in columns:
        table.add_column(
            column, justify="right" if column in numbers else "left", no_wrap=column in numbers | whole, overflow="fold"
        )
    return table


def number(value: float | None, digits: int = 2) -> str:
    """A number short enough for a column; "-" for none."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.{digits}e}"


def score_of(model: ModelResult) -> str:
    """Score and the threshold above which it means backdoored."""
    return "-" if model.score is None else f"{number(model.score)} / {number(model.threshold)}"


def print_report(report: ScanReport, console: Console) -> None:
    """One line per model, then one line of counts."""
    columns = "model", "format", "verdict", "rule", "score / limit", "why", "seconds"
    table = table_of(*columns, numbers=("score / limit", "seconds"), whole=["verdict", "rule"])
    for model in report.models:
        table.add_row(
            safe(model.path),
            safe(model.format or "-"),
            Text(model.verdict.value, STYLES[model.verdict.value]),
            model.rule or "-",
            score_of(model),
            safe(model.reason),
            number(model.seconds, 1),
        )
    if report.models:
        console.print(table)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in report.summary.items())
    console.print(f"{len(report.models)} models: {counts}")


def print_detection(log_ratios: Sequence[float], console: Console) -> None:
    """One row per input, then the counts."""
    table = table_of("input", "log ratio", "verdict", numbers=["input", "log ratio"])
    for index, value in enumerate(log_ratios):
        table.add_row(str(index), number(value), Text("triggered", "bold red") if value > 0 else Text("clean", "green"))
    console.print(table)
    triggered = sum(value > 0 for value in log_ratios)
    console.print(f"{len(log_ratios)} inputs: {triggered} triggered, {len(log_ratios) - triggered} clean")


def print_noise_unlearning(report: NoiseUnlearnReport, console: Console) -> None:
    """One line per trigger and sampler, then the change of clean samples."""
    numbers = ["collapse before", "after"]
    table = table_of("trigger", "sampler", *numbers, numbers=numbers)
    for effect in report.effects:
        table.add_row(safe(effect.trigger), effect.sampler, number(effect.collapse_before), number(effect.collapse_after))
    if report.effects:
        console.print(table)
        console.print(
            "diversity collapse: how many times less samples vary with the trigger than without; near 1 it does nothing"
        )
    console.print(f"clean drift {number(report.clean_drift, 3)}, {report.steps} steps, {number(report.seconds, 1)} s")


def interval(rate: Rate) -> str:
    """A share with its 95% interval, in percent."""
    if rate.rate is None or rate.low is None or rate.high is None:
        return "-"
    return f"{100 * rate.rate:.0f}% [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"


def print_text_unlearning(report: TextUnlearnReport, console: Console) -> None:
    """One line per trigger and variant, then the trained module and the change of clean images."""
    numbers = ["effect before", "after"]
    table = table_of("trigger", "variant", *numbers, numbers=numbers)
    for effect in report.effects:
        table.add_row(safe(effect.trigger), effect.variant, interval(effect.before), interval(effect.after))
    console.print(table)
    console.print(
        f"effect: share of held-out prompts whose image shows the trigger's effect according to {report.detector}, "
        "with 95% Wilson intervals"
    )
    for trigger in report.triggers:
        console.print(safe(f"tokens of {trigger.trigger!r}: {' '.join(trigger.tokens)}"))
    console.print(f"trained: {report.module} ({report.module_reason})")
    console.print(
        f"clean drift {number(report.clean_drift, 3)}, diversity {number(report.diversity_before, 3)} to "
        f"{number(report.diversity_after, 3)}, {report.steps} steps, {number(report.seconds, 1)} s"
    )


def evidence_line(model: CalibrationModel, features: Sequence[str]) -> str:
    """A calibration model's label and features."""
    values = ", ".join(f"{name} {number(getattr(model.evidence, name), 4)}" for name in features)
    return f"{model.name}: {'backdoored' if model.backdoored else 'benign'}, {values}"


def print_calibration(
    calibration: Calibration, left_out: Sequence[tuple[CalibrationModel, Decision]], console: Console
) -> None:
    """The features of every model, the decision on each benign one without itself, and the limits of every pool."""
    decisions = {model.name: decision for model, decision in left_out}
    features = calibration.settings.features
    columns = "model", "family", "shape", "label", *features, "left out"
    table = table_of(*columns, numbers=features, whole=["shape", "label", "left out"])
    for model in calibration.models:
        decision = None if model.backdoored else decisions.get(model.name)
        table.add_row(
            safe(model.name),
            safe(str(model.family)),
            "x".join(map(str, model.shape)),
            "backdoored" if model.backdoored else "benign",
            *(number(getattr(model.evidence, name), 4) for name in features),
            "-" if decision is None else Text(decision.verdict.value, STYLES[decision.verdict.value]),
        )
    console.print(table)
    console.print("left out: the verdict on a benign model by a calibration without it")
    for group, pool in calibration.pools.items():
        limits = " or ".join(f"{name} {number(limit, 4)}" for name, limit in pool.limits.items())
        condition = "where the classifier's probability exceeds 0.5" if pool.labelled else f"above {limits}"
        console.print(safe(f"{group}: backdoored {condition}"))
