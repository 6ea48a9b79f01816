"""What the commands share: exit codes, options, messages."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from seal_fast.printable import printable

CLEAN, BACKDOORED, FAILED, NOTHING, USAGE, INTERRUPTED = 0, 1, 2, 3, 4, 130

_UsageError: Any = typer.BadParameter.__base__


class Group(TyperGroup):
    """Maps errors to the exit codes above, in which typer's 2 (usage error) and Python's 1 (exception) have other meanings."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _own_exit_codes():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _own_exit_codes():
            return super().invoke(ctx)


class PanelCommand(TyperCommand):
    """Lists options under the titles of their `rich_help_panel`, in plain text.

    Rich's own panels cut long option names off in a terminal of 80 columns.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                title = "Arguments" if parameter.param_type_name == "argument" else "Options"
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or title, []).append(record)
        for title, records in panels.items():
            with formatter.section(title):
                formatter.write_dl(records)


@contextmanager
def _own_exit_codes() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        error.exit_code = USAGE
        error.message = printable(error.message)
        raise
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt as interrupt:
        # outside the commands' own handling, such as in the import of torch
        say("interrupted")
        raise typer.Exit(INTERRUPTED) from interrupt
    except Exception as error:
        for line in traceback.format_exc().splitlines():
            say(line)
        raise typer.Exit(FAILED) from error


class Format(StrEnum):
    CONSOLE = "console"
    JSON = "json"


class Weights(StrEnum):
    EMA = "ema"
    RAW = "raw"


def known_preset(name: str | None) -> str | None:
    from seal_fast.noise_triggers import PRESETS

    if name is not None and name not in PRESETS:
        raise typer.BadParameter(f"must be one of {', '.join(PRESETS)}, not {name!r}")
    return name


PROMPTS_HELP = "Clean prompts, one a line; every other one is held out (default: those of the model card, if it has enough)."
BASE_HELP = "A UNet or text encoder alone needs the pipeline that it belongs to."
PRESET_HELP = "Method that finds triggers: search (default), or published, which is TERD's own."
OutputFormat = Annotated[Format, typer.Option("--format", help="Format of the result on standard output.")]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        callback=known_preset,
        help=PRESET_HELP,
    ),
]


def seed_option(help: str, **others: Any) -> Any:
    """An option that is a seed. torch takes 63 bits, and parts of a command add to it."""
    return typer.Option(metavar="INTEGER", min=0, max=2**62, help=help, **others)


Seed = Annotated[int, seed_option("Seed of the trigger reversion.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bars, only one line per finished model.")]


def say(message: str) -> None:
    """Print a line to stderr; stdout is for results. Nothing from a file may control the terminal."""
    typer.echo(printable(message), err=True)


@contextmanager
def printing() -> Iterator[None]:
    """Print a result. One that cannot be printed, as into a closed pipe or onto a full disk, leaves the exit code as it is."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError):
            # Python flushes once more at its end, and would exit with a code of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            say(f"the result could not be printed: {error.strerror}")


def create_folder(folder: Path, option: str) -> None:
    """Create the folder that a user named with `option`, and write into it; a failure is a usage error."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise typer.BadParameter(f"{option} cannot be written: {error}") from error


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn errors about a user's own file or text into usage errors."""
    from seal_fast.checkpoints import CheckpointError

    try:
        yield
    except (CheckpointError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
