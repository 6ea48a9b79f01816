"""What the commands share: exit codes, options, messages."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

CLEAN, BACKDOORED, FAILED, NOTHING, USAGE, INTERRUPTED = 0, 1, 2, 3, 4, 130

_UsageError: Any = typer.BadParameter.__base__


class Group(TyperGroup):
    """Typer exits with 2 after a usage error and Python with 1 after an exception; both mean something else here."""

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
        raise
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        traceback.print_exc()
        raise typer.Exit(FAILED) from error


class Format(StrEnum):
    CONSOLE = "console"
    JSON = "json"


class Weights(StrEnum):
    EMA = "ema"
    RAW = "raw"


OutputFormat = Annotated[Format, typer.Option("--format", help="What is written to standard output.")]


def say(message: str) -> None:
    typer.echo(message, err=True)


@contextmanager
def usage_errors() -> Iterator[None]:
    """What a user's own file or text is refused for is an error of usage."""
    from seal_fast.checkpoints import CheckpointError

    try:
        yield
    except (CheckpointError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
