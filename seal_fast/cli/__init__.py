"""The command line, one file per command: parse, call, print, exit code.

Commands import what they use when they run, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from seal_fast.cli import calibrate, detect, doctor, scan, unlearn, zoo
from seal_fast.cli.common import Group, PanelCommand
from seal_fast.version import __version__

app = typer.Typer(cls=Group, add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command(cls=PanelCommand, epilog=scan.EPILOG)(scan.scan)
app.command(epilog=detect.EPILOG)(detect.detect)
app.command(cls=PanelCommand, epilog=unlearn.EPILOG)(unlearn.unlearn)
app.command(epilog=calibrate.EPILOG, short_help="Measure models with known labels.")(calibrate.calibrate)
app.command()(doctor.doctor)
app.add_typer(zoo.app, name="zoo")


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
    """Find backdoors in diffusion checkpoints and unlearn them."""


def main() -> None:
    """Run the command that the arguments of this process name."""
    # transformers warns every user of a pipeline that torchvision is missing, which nothing here needs
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # a name that the terminal's encoding cannot show must not cost the verdict
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    app(prog_name="seal-fast")
