"""`seal-fast zoo`: train small benign and backdoored models for evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seal_fast.cli.common import create_folder, say

app = typer.Typer(help="Train small benign and backdoored models for evaluation.", no_args_is_help=True, rich_markup_mode=None)

Out = Annotated[Path, typer.Argument(metavar="DIR", file_okay=False, help="Folder for the models.")]
Only = Annotated[list[str] | None, typer.Option(metavar="MODEL", help="Train this model only; may be repeated.")]


@app.command("build")
def build(out: Out = Path("zoo"), only: Only = None) -> None:
    """Train the unconditional models from their seeds."""
    from seal_fast.zoo.build import build_zoo

    create_folder(out, "DIR")
    build_zoo(out, only or None, say)


@app.command("build-text")
def build_text(out: Out = Path("zoo-text"), only: Only = None) -> None:
    """Train the text-to-image models from their seeds."""
    from seal_fast.zoo.build_text import build_text_zoo

    create_folder(out, "DIR")
    build_text_zoo(out, only or None, say)
