"""`seal-fast calibrate`: measure models with known labels, so that a scan can compare others with them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seal_fast.cli.common import FAILED, NOTHING, Preset, Quiet, Seed, printing, say

if TYPE_CHECKING:
    from seal_fast.noise_triggers import CalibrationModel

EPILOG = """Exit codes:

\b
4  usage error, such as a bad option or a path that does not exist
3  no checkpoint found at the given paths
2  a model could not be measured; nothing is written
0  the calibration is written"""


def calibrate(
    benign: Annotated[
        list[Path],
        typer.Argument(metavar="BENIGN", exists=True, help="Models known to be clean, or folders that contain some."),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", dir_okay=False, help="Calibration file to write.")],
    backdoored: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", exists=True, help="Model known to be backdoored, or folder; may be repeated."),
    ] = None,
    preset: Preset = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Measure models with known labels, so that `seal-fast scan --calibration` can compare others with them.

    Give at least 2 benign models of every model family that you scan; 10 are better. With --backdoored, a classifier trained on
    both labels decides.
    """
    from seal_fast.checkpoints import CheckpointError
    from seal_fast.noise_triggers import DEFAULT_PRESET, PRESETS
    from seal_fast.report.console import console_for, evidence_line, print_calibration
    from seal_fast.report.progress import ProgressDisplay
    from seal_fast.workflows.calibrate import leave_one_out, measure
    from seal_fast.workflows.discovery import find_checkpoints

    clean, dirty = find_checkpoints(benign), find_checkpoints(backdoored or [])
    if both := {one.path for one in clean} & {one.path for one in dirty}:
        raise typer.BadParameter(f"{min(both)} cannot be both benign and backdoored")
    if not clean:
        say("nothing to calibrate on: no checkpoint found at the given paths")
        raise typer.Exit(NOTHING)
    settings = PRESETS[preset or DEFAULT_PRESET]
    with ProgressDisplay(sys.stderr, quiet) as display:

        def on_model(model: CalibrationModel, index: int, total: int) -> None:
            display.done(model.name, index, total, evidence_line(model, settings.features))

        try:
            calibration = measure(clean, dirty, settings, seed=seed, on_progress=display.on_progress, on_model=on_model)
        except (CheckpointError, ValueError) as error:
            display.bar.stop()
            say(f"calibration stopped, nothing written: {error}")
            raise typer.Exit(FAILED) from error
    calibration.save(out)
    with printing():
        print_calibration(calibration, leave_one_out(calibration), console_for(sys.stdout))
    say(f"written: {out}")
