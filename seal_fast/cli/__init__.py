"""The command line: parse, call, print, exit code. Commands import what they use, so that `--help` does not wait for torch."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from seal_fast import __version__
from seal_fast.cli.common import (
    BACKDOORED,
    CLEAN,
    FAILED,
    INTERRUPTED,
    NOTHING,
    Format,
    Group,
    OutputFormat,
    Weights,
    say,
)
from seal_fast.cli.unlearn import EPILOG as UNLEARN_EPILOG
from seal_fast.cli.unlearn import unlearn

if TYPE_CHECKING:
    from seal_fast.noise_triggers import Calibration, CalibrationModel
    from seal_fast.report.progress import ProgressDisplay
    from seal_fast.results.scan import ScanReport

EXIT_CODES = """Exit codes, the first that holds:

\b
  4  usage: a bad option, or a path that does not exist
  3  nothing to scan
  1  a model is backdoored, even if others failed
  2  a model failed or is inconclusive
  0  all models are clean
130  interrupted; --out holds the finished models"""

app = typer.Typer(cls=Group, add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
zoo = typer.Typer(help="Small models, benign and backdoored, for evaluation.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(zoo, name="zoo")
app.command(epilog=UNLEARN_EPILOG)(unlearn)


class FailOn(StrEnum):
    INCONCLUSIVE = "inconclusive"


def _known_preset(name: str | None) -> str | None:
    from seal_fast.noise_triggers import PRESETS

    if name is not None and name not in PRESETS:
        raise typer.BadParameter(f"must be one of {', '.join(PRESETS)}, not {name!r}")
    return name


Preset = Annotated[str | None, typer.Option(callback=_known_preset, help="Reversion by name: search (default) or published.")]
Seed = Annotated[int, typer.Option(help="Seed of the reversion.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar: one line per finished model.")]
ExistingPath = typer.Argument(exists=True, show_default=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"seal-fast {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Find backdoors in diffusion checkpoints and seal them."""


def exit_code(report: ScanReport, fail_on: FailOn | None = None, exit_zero: bool = False) -> int:
    """The code of a completed scan; see `EXIT_CODES`."""
    if not report.models:
        return NOTHING
    if exit_zero:
        return CLEAN
    counts = report.summary
    if counts["backdoored"] or (fail_on is FailOn.INCONCLUSIVE and counts["inconclusive"]):
        return BACKDOORED
    return FAILED if counts["error"] or counts["inconclusive"] else CLEAN


def _calibration(file: Path | None, preset: str | None) -> Calibration | None:
    """The calibration of a file; None means the shipped one of the preset, which is checked to be there."""
    from seal_fast.noise_triggers import DEFAULT_PRESET, Calibration, shipped_calibration

    if file is not None and preset is not None:
        raise typer.BadParameter("--calibration brings its own settings: leave --preset out")
    try:
        if file is not None:
            return Calibration.load(file)
        shipped_calibration(preset or DEFAULT_PRESET)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"no usable calibration: {error}") from error
    return None


def _writable(folder: Path | None) -> None:
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--out cannot be written: {error}") from error


@app.command(epilog=EXIT_CODES)
def scan(
    paths: Annotated[
        list[Path] | None, typer.Argument(exists=True, show_default=False, help="Checkpoints, or folders with some.")
    ] = None,
    batch: Annotated[
        list[Path] | None, typer.Option(exists=True, file_okay=False, help="Folder to scan; may be repeated.")
    ] = None,
    preset: Preset = None,
    calibration: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="EffectDetector by this file of `seal-fast calibrate`.")
    ] = None,
    weights: Annotated[Weights, typer.Option(help="Which weights to scan where a checkpoint holds both.")] = Weights.EMA,
    out: Annotated[Path | None, typer.Option(file_okay=False, help="Folder for report.json, triggers and images.")] = None,
    output: OutputFormat = Format.CONSOLE,
    exit_zero: Annotated[
        bool, typer.Option("--exit-zero", help="Exit with 0 after a completed scan, whatever it found.")
    ] = False,
    fail_on: Annotated[FailOn | None, typer.Option(help="Exit with 1 for this verdict too.")] = None,
    seed: Seed = 0,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, show_default=False, help="Models at a time (default: what cores and memory allow; 4 on a GPU)."),
    ] = None,
    quiet: Quiet = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say which backend each op uses.")] = False,
) -> None:
    """Which of these checkpoints are backdoored?"""
    everything = [*(paths or []), *(batch or [])]
    if not everything:
        raise typer.BadParameter("name at least one path, or --batch DIR")
    chosen = _calibration(calibration, preset)
    _writable(out)

    from seal_fast.noise_triggers import DEFAULT_PRESET
    from seal_fast.report.console import console_for, print_report
    from seal_fast.report.json import report_json
    from seal_fast.report.progress import ProgressDisplay
    from seal_fast.workflows.scan import scan as run

    backends = _backends()
    if verbose:
        say(backends)
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
    if not report.models:
        say("nothing to scan: no checkpoint found at the given paths")
    if output is Format.JSON:
        typer.echo(report_json(report))
    else:
        print_report(report, console_for(sys.stdout))
    raise typer.Exit(exit_code(report, fail_on, exit_zero))


@contextmanager
def _interruptible(display: ProgressDisplay, out: Path | None) -> Iterator[None]:
    def on_signal(number: int, frame: Any) -> NoReturn:
        # Python drops an exception raised in a finaliser, and the scan went on: the display raises it again
        display.interrupted = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        display.bar.stop()
        kept = f"report: {out / 'report.json'}" if out else "nothing kept, since --out was not given"
        say(f"interrupted: {display.finished} of {display.total} models finished; {kept}")
        raise typer.Exit(INTERRUPTED) from interrupt
    finally:
        signal.signal(signal.SIGINT, before)


@app.command(
    epilog="""Exit codes:

\b
4  usage: bad option, trigger or inputs
1  an input is triggered
0  none is"""
)
def detect(
    trigger: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="trigger.safetensors of a scan.")],
    inputs: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Noise inputs [N,C,H,W]: .npy or .safetensors.")],
    output: OutputFormat = Format.CONSOLE,
) -> None:
    """Which of these noise inputs carry the trigger?"""
    from seal_fast.checkpoints import CheckpointError
    from seal_fast.checkpoints.trigger import load_inputs, load_prior_scale, load_trigger
    from seal_fast.noise_triggers import InputDetector
    from seal_fast.report.console import console_for, print_detection
    from seal_fast.report.json import detection_json
    from seal_fast.results.environment import tool

    try:
        found, noise = load_trigger(trigger), load_inputs(inputs)
        detector = InputDetector(found, load_prior_scale(trigger))
        if noise.shape[1:] != found.mu.shape:
            shapes = f"{list(noise.shape[1:])} do not fit the trigger's {list(found.mu.shape)}"
            raise CheckpointError(inputs, f"inputs of shape {shapes}")
    except CheckpointError as error:
        raise typer.BadParameter(str(error)) from error
    log_ratios = detector.log_ratio(noise)[:, 0].tolist()
    if output is Format.JSON:
        typer.echo(detection_json(log_ratios, tool()))
    else:
        print_detection(log_ratios, console_for(sys.stdout))
    raise typer.Exit(BACKDOORED if any(value > 0 for value in log_ratios) else CLEAN)


@app.command()
def calibrate(
    benign: Annotated[
        list[Path], typer.Argument(exists=True, show_default=False, help="Models known to be clean, or folders.")
    ],
    out: Annotated[Path, typer.Option(dir_okay=False, help="Calibration file to write.")],
    backdoored: Annotated[
        list[Path] | None, typer.Option(exists=True, help="Model or folder known to be backdoored; may be repeated.")
    ] = None,
    preset: Preset = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Measure known models, so that `scan --calibration` can judge unknown ones by them.

    Give at least 2 benign models of the suspects' kind; 10 are better. With --backdoored the verdict is a classifier's.
    """
    from seal_fast.checkpoints import CheckpointError
    from seal_fast.noise_triggers import DEFAULT_PRESET, PRESETS
    from seal_fast.report.console import console_for, evidence_line, print_calibration
    from seal_fast.report.progress import ProgressDisplay
    from seal_fast.workflows.calibrate import leave_one_out, measure
    from seal_fast.workflows.discovery import find_candidates

    clean, dirty = find_candidates(benign), find_candidates(backdoored or [])
    if both := {one.path for one in clean} & {one.path for one in dirty}:
        raise typer.BadParameter(f"{min(both)} cannot be benign and backdoored")
    if not clean:
        say("nothing to calibrate on: no checkpoint found at the given paths")
        raise typer.Exit(NOTHING)
    settings = PRESETS[preset or DEFAULT_PRESET]
    with ProgressDisplay(sys.stderr, quiet) as display:

        def on_model(model: CalibrationModel, index: int, total: int) -> None:
            display.done(model.name, index, total, evidence_line(model, settings.features))

        try:
            pool = measure(clean, dirty, settings, seed=seed, on_progress=display.on_progress, on_model=on_model)
        except (CheckpointError, ValueError) as error:
            display.bar.stop()
            say(f"calibration stopped, nothing written: {error}")
            raise typer.Exit(FAILED) from error
    pool.save(out)
    print_calibration(pool, leave_one_out(pool), console_for(sys.stdout))
    say(f"written: {out}")


def _backends() -> str:
    """One line per op: the backend that will run it here, and why not a faster one."""
    from seal_fast.ops import explain

    lines = []
    try:
        for op in explain():
            refusals = "".join(f"; not {backend}: {reason}" for backend, reason in op.refusals.items())
            lines.append(f"{op.op} on {op.device}: {op.chosen or 'nothing can run'}{refusals}")
    except RuntimeError as error:
        raise typer.BadParameter(str(error)) from error
    return "\n".join(lines)


@app.command()
def doctor() -> None:
    """What will run here, and why not the faster one."""
    from seal_fast.results.environment import environment, openmp_libraries

    typer.echo(f"seal-fast {__version__}")
    for name, value in environment().items():
        typer.echo(f"  {name}: {'not available' if value is None else value}")
    # the backends load what they need, so the list of libraries comes after them
    backends = _backends()
    libraries = openmp_libraries()
    typer.echo("OpenMP: " + (", ".join(libraries) or "no runtime found"))
    if len(libraries) > 1:
        typer.echo("  more than one runtime: their threads compete for the same cores; set OMP_NUM_THREADS")
    typer.echo(backends)


@zoo.command("build")
def zoo_build(
    out: Annotated[Path, typer.Argument(file_okay=False, help="Folder for the models.")] = Path("zoo"),
    only: Annotated[list[str] | None, typer.Option(help="Build this model only; may be repeated.")] = None,
) -> None:
    """Train the zoo's models from their seeds."""
    from seal_fast.zoo.build import build_zoo

    _writable(out)
    build_zoo(out, only or None, say)


@zoo.command("build-text")
def zoo_build_text(
    out: Annotated[Path, typer.Argument(file_okay=False, help="Folder for the models.")] = Path("zoo-text"),
    only: Annotated[list[str] | None, typer.Option(help="Build this model only; may be repeated.")] = None,
) -> None:
    """Train the zoo's text-to-image models from their seeds."""
    from seal_fast.zoo.build_text import build_text_zoo

    _writable(out)
    build_text_zoo(out, only or None, say)


def main() -> None:
    # transformers tells every user of a pipeline that torchvision is not there, which nothing here needs
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app()
