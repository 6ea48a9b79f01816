"""`seal-fast scan`: which checkpoints are backdoored?"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from seal_fast.cli.common import (
    BACKDOORED,
    CLEAN,
    FAILED,
    INTERRUPTED,
    NOTHING,
    Format,
    OutputFormat,
    Preset,
    Quiet,
    Seed,
    Weights,
    create_folder,
    say,
)
from seal_fast.cli.doctor import backends

if TYPE_CHECKING:
    from seal_fast.noise_triggers import Calibration
    from seal_fast.report.progress import ProgressDisplay
    from seal_fast.results.scan import ScanReport

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


Paths = Annotated[
    list[Path] | None,
    typer.Argument(metavar="PATH", exists=True, show_default=False, help="Checkpoints, or folders that contain some."),
]
Batch = Annotated[
    list[Path] | None,
    typer.Option(metavar="DIR", exists=True, file_okay=False, help="Folder that contains checkpoints; may be repeated."),
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="Calibration to decide by, written by `seal-fast calibrate`; replaces the shipped one.",
    ),
]
ScannedWeights = Annotated[Weights, typer.Option(help="Weights to scan where a checkpoint holds both.")]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        file_okay=False,
        help="Folder for report.json, triggers and images. A scan that was interrupted resumes from it.",
    ),
]
ExitZero = Annotated[bool, typer.Option("--exit-zero", help="Exit with 0 after a completed scan, whatever its verdicts.")]
AlsoFailOn = Annotated[FailOn | None, typer.Option(help="Exit with 1 for a model with this verdict, too.")]
Jobs = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        show_default=False,
        help="Models scanned at a time. Default: what cores and memory allow; on a GPU, at most 4.",
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show which backend runs each op.")]


def scan(
    paths: Paths = None,
    batch: Batch = None,
    preset: Preset = None,
    calibration: CalibrationFile = None,
    weights: ScannedWeights = Weights.EMA,
    out: Out = None,
    output: OutputFormat = Format.CONSOLE,
    exit_zero: ExitZero = False,
    fail_on: AlsoFailOn = None,
    seed: Seed = 0,
    jobs: Jobs = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Find out which checkpoints are backdoored."""
    everything = [*(paths or []), *(batch or [])]
    if not everything:
        raise typer.BadParameter("name at least one path, or --batch DIR")
    chosen = _calibration(calibration, preset)
    if out is not None:
        create_folder(out, "--out")

    from seal_fast.noise_triggers import DEFAULT_PRESET
    from seal_fast.report.progress import ProgressDisplay
    from seal_fast.workflows.scan import scan as run

    # always, since a SEAL_FAST_BACKEND that does not exist is a usage error
    backends_here = backends()
    if verbose:
        say(backends_here)
    with ProgressDisplay(sys.stderr, quiet) as display, _interruptible(display, out):
        report = run(
            everything,
            preset=preset or DEFAULT_PRESET,
            calibration=chosen,
            weights=weights.value,
            seed=seed,
            out=out,
            jobs=jobs,
            on_progress=display.on_progress,
            on_result=display.on_result,
        )
    _show(report, output)
    raise typer.Exit(exit_code(report, fail_on, exit_zero))


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
        display.bar.stop()
        kept = f"report: {out / 'report.json'}" if out else "nothing was kept, since --out was not given"
        say(f"interrupted: {display.finished} of {display.total} models finished; {kept}")
        raise typer.Exit(INTERRUPTED) from interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def _show(report: ScanReport, output: Format) -> None:
    from seal_fast.report.console import console_for, print_report
    from seal_fast.report.json import report_json

    if not report.models:
        say("nothing to scan: no checkpoint found at the given paths")
    if output is Format.JSON:
        typer.echo(report_json(report))
    else:
        print_report(report, console_for(sys.stdout))
