"""What all commands share."""

from __future__ import annotations

import typer
from typer.testing import CliRunner

from seal_fast.cli.common import INTERRUPTED, Group


def test_an_interrupt_outside_the_work_of_a_command_is_told() -> None:
    app = typer.Typer(cls=Group)

    @app.command()
    def slow_imports() -> None:
        raise KeyboardInterrupt

    @app.command()
    def other() -> None: ...

    result = CliRunner().invoke(app, ["slow-imports"])
    assert result.exit_code == INTERRUPTED
    assert result.stderr == "interrupted\n"
    assert result.stdout == ""
