"""`seal-fast scan`: which checkpoints are backdoored?"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from seal_fast.cli.budget import parse_budget
from seal_fast.cli.common import (
    BACKDOORED,
    BASE_HELP,
    CLEAN,
    FAILED,
    INTERRUPTED,
    NOTHING,
    PRESET_HELP,
    PROMPTS_HELP,
    Format,
    Weights,
    create_folder,
    known_preset,
    printing,
    say,
    seed_option,
    usage_errors,
)
from seal_fast.cli.doctor import backends

if TYPE_CHECKING:
    from seal_fast.noise_triggers import Calibration
    from seal_fast.report.progress import ProgressDisplay
    from seal_fast.results.scan import ScanReport
    from seal_fast.text_triggers.search_settings import Budget, TextSearchSettings

EPILOG = """Exit codes; the first that applies counts:

\b
  4  usage error, such as a bad option or a path that does not exist
  3  no checkpoint found at the given paths
  1  a model is backdoored, even if others failed
  2  a model failed or is inconclusive
  0  all models are clean
130  interrupted; --out holds the results of the finished models"""


class FailOn(StrEnum):
    INCONCLUSIVE = "inconclusive"


SHOWN = 3
"""Images that the last lines of a scan name."""

NOISE, TEXT, OUTPUT = "Unconditional models (noise triggers)", "Text-to-image models (text triggers)", "Output"

Paths = Annotated[
    list[Path] | None,
    typer.Argument(metavar="PATH", exists=True, show_default=False, help="Checkpoints, or folders that contain some."),
]
Batch = Annotated[
    list[Path] | None,
    typer.Option(metavar="DIR", exists=True, file_okay=False, help="Folder that contains checkpoints; may be repeated."),
]
ScanPreset = Annotated[
    str | None,
    typer.Option(metavar="NAME", callback=known_preset, help=PRESET_HELP, rich_help_panel=NOISE),
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="Calibration to decide by, written by `seal-fast calibrate`; replaces the shipped one.",
        rich_help_panel=NOISE,
    ),
]
ScannedWeights = Annotated[Weights, typer.Option(help="Weights to scan where a checkpoint holds both.", rich_help_panel=NOISE)]
Base = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        exists=True,
        file_okay=False,
        help=f"The clean pipeline that a model was made from: what a text does there is no backdoor. {BASE_HELP}",
        rich_help_panel=TEXT,
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help=PROMPTS_HELP,
        rich_help_panel=TEXT,
    ),
]
BudgetText = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="N|TIME",
        help="End a search after N UNet evaluations, or a time such as 90s, 30m or 2h (default: when it is complete).",
        rich_help_panel=TEXT,
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        metavar="NUMBER",
        min=1.0,
        help="Guidance scale of the images that verify a trigger (default: 7.5).",
        rich_help_panel=TEXT,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Only count the UNet evaluations, and predict their time.", rich_help_panel=TEXT),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        file_okay=False,
        help="Folder for report.json, triggers and images. A scan that was interrupted resumes from it.",
        rich_help_panel=OUTPUT,
    ),
]
Output = Annotated[Format, typer.Option("--format", help="Format of the result on standard output.", rich_help_panel=OUTPUT)]
ExitZero = Annotated[
    bool,
    typer.Option("--exit-zero", help="Exit with 0 after a completed scan, whatever its verdicts.", rich_help_panel=OUTPUT),
]
AlsoFailOn = Annotated[
    FailOn | None, typer.Option(help="Exit with 1 for a model with this verdict, too.", rich_help_panel=OUTPUT)
]
Seed = Annotated[int, seed_option("Seed of the searches.")]
Jobs = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        show_default=False,
        help="Models scanned at a time. Default: what cores and memory allow; on a GPU, at most 4.",
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Show no progress bars, only one line per finished model.", rich_help_panel=OUTPUT),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show which backend runs each op.", rich_help_panel=OUTPUT)]


def scan(
    paths: Paths = None,
    batch: Batch = None,
    seed: Seed = 0,
    jobs: Jobs = None,
    preset: ScanPreset = None,
    calibration: CalibrationFile = None,
    weights: ScannedWeights = Weights.EMA,
    base: Base = None,
    prompts: Prompts = None,
    budget: BudgetText = None,
    guidance: Guidance = None,
    dry_run: DryRun = False,
    out: Out = None,
    output: Output = Format.CONSOLE,
    exit_zero: ExitZero = False,
    fail_on: AlsoFailOn = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Find out which checkpoints are backdoored.

    Unconditional models are searched for noise triggers, text-to-image models for text triggers.
    """
    everything = [*(paths or []), *(batch or [])]
    if not everything:
        raise typer.BadParameter("name at least one path, or --batch DIR")
    chosen = _calibration(calibration, preset)
    options = _text_options(base, prompts, budget, guidance)
    if dry_run:
        _dry_run(everything, options, seed, output)
    if out is not None:
        create_folder(out, "--out")

    from seal_fast.noise_triggers import DEFAULT_PRESET
    from seal_fast.report.progress import ProgressDisplay
    from seal_fast.workflows.scan import scan as run

    # always, since a SEAL_FAST_BACKEND that does not exist is a usage error
    backends_here = backends()
    if verbose:
        for line in backends_here.splitlines():
            say(line)
    try:
        with ProgressDisplay(sys.stderr, quiet) as display, _interruptible(display, out):
            report = run(
                everything,
                preset=preset or DEFAULT_PRESET,
                calibration=chosen,
                weights=weights.value,
                **vars(options),
                seed=seed,
                out=out,
                jobs=jobs,
                on_progress=display.on_progress,
                on_result=display.on_result,
            )
    except OSError as error:
        # before the first model; what fails later costs no scan
        raise typer.BadParameter(f"cannot be scanned or written: {error}") from error
    _show(report, output)
    if out is not None:
        kept = f"written: {out}" if _is_kept(report, out) else f"not written: {out}"
        for line in (kept, *_images(report, out)):
            say(line)
    raise typer.Exit(exit_code(report, fail_on, exit_zero))


@dataclass(frozen=True)
class TextOptions:
    """Options for text-to-image models, under the names of `seal_fast.scan`."""

    base: Path | None
    prompts: tuple[str, ...] | None
    text_settings: TextSearchSettings
    budget: Budget


def _text_options(base: Path | None, prompts: Path | None, budget: str | None, guidance: float | None) -> TextOptions:
    from seal_fast.text_triggers.search_settings import Budget, TextSearchSettings
    from seal_fast.workflows.prompts import read_prompts

    with usage_errors():
        chosen = None if prompts is None else tuple(read_prompts(prompts))
    settings = TextSearchSettings() if guidance is None else TextSearchSettings(guidance=guidance)
    return TextOptions(base, chosen, settings, Budget() if budget is None else parse_budget(budget))


def _dry_run(everything: list[Path], options: TextOptions, seed: int, output: Format) -> NoReturn:
    """Print the plan. The exit code tells a model that cannot be loaded, and whether there is anything to scan."""
    from seal_fast.report.console import console_for, print_plan
    from seal_fast.report.json import plan_json
    from seal_fast.workflows.dry_run import plan_scan
    from seal_fast.workflows.text_scan import TextScan

    plan = plan_scan(everything, TextScan(options.base, options.prompts, options.text_settings, options.budget, seed))
    with printing():
        if output is Format.JSON:
            typer.echo(plan_json(plan))
        else:
            print_plan(plan, console_for(sys.stdout))
    if not plan.searches and not plan.others:
        raise typer.Exit(NOTHING)
    raise typer.Exit(FAILED if any(search.error for search in plan.searches) else CLEAN)


def exit_code(report: ScanReport, fail_on: FailOn | None = None, exit_zero: bool = False) -> int:
    """The exit code of a completed scan, as `EPILOG` defines it."""
    if not report.models:
        return NOTHING
    if exit_zero:
        return CLEAN
    counts = report.summary
    if counts["backdoored"] or (fail_on is FailOn.INCONCLUSIVE and counts["inconclusive"]):
        return BACKDOORED
    return FAILED if counts["error"] or counts["inconclusive"] else CLEAN


def _calibration(file: Path | None, preset: str | None) -> Calibration | None:
    """The calibration in `file`; None stands for the preset's shipped one, after checking that it can be read."""
    from seal_fast.noise_triggers import DEFAULT_PRESET, Calibration, shipped_calibration

    if file is not None and preset is not None:
        raise typer.BadParameter("--calibration brings its own settings: leave --preset out")
    try:
        if file is not None:
            return Calibration.load(file)
        shipped_calibration(preset or DEFAULT_PRESET)
    except FileNotFoundError as error:
        hint = f"make one with `seal-fast calibrate --preset {preset}` and pass it as --calibration"
        raise typer.BadParameter(f"no calibration is shipped for the preset {preset}: {hint}") from error
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"no usable calibration: {error}") from error
    return None


@contextmanager
def _interruptible(display: ProgressDisplay, out: Path | None) -> Iterator[None]:
    """On Ctrl-C, say what was kept and exit with INTERRUPTED."""

    def on_signal(number: int, frame: Any) -> NoReturn:
        # Python drops an exception that a finaliser raises, and the scan would go on: the display raises it again
        display.interrupted = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        from seal_fast.report.json import REPORT

        display.bar.stop()
        kept = f"report: {out / REPORT}" if out else "nothing was kept, since --out was not given"
        say(f"interrupted: {display.finished} of {display.total} models finished; {kept}")
        raise typer.Exit(INTERRUPTED) from interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def _show(report: ScanReport, output: Format) -> None:
    from seal_fast.report.console import console_for, print_report
    from seal_fast.report.json import report_json

    if not report.models:
        say("nothing to scan: no checkpoint found at the given paths")
    with printing():
        if output is Format.JSON:
            typer.echo(report_json(report))
        else:
            print_report(report, console_for(sys.stdout))


def _is_kept(report: ScanReport, out: Path) -> bool:
    """Whether the report in the folder is this one."""
    from seal_fast.report.json import read_report, report_json

    return (read_report(out) or "").rstrip("\n") == report_json(report)


def _images(report: ScanReport, out: Path) -> Iterator[str]:
    """Lines that name the images of the first backdoored models."""
    from seal_fast.workflows.text_trigger_files import SAMPLES as TEXT_SAMPLES
    from seal_fast.workflows.trigger_files import SAMPLES

    backdoored = [model for model in report.models if model.verdict.value == "backdoored"]
    for model in backdoored[:SHOWN]:
        image = out / model.path / (TEXT_SAMPLES.format(1) if model.detector == "text" else SAMPLES)
        # a full disk costs the images, not the verdict
        if image.is_file():
            yield f"look at: {image}"
