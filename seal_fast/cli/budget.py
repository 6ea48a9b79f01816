"""The option --budget: where a search for text triggers ends before it is complete."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from seal_fast.text_triggers.search_settings import Budget

SECONDS = {"s": 1, "m": 60, "h": 3600}


def parse_budget(text: str) -> Budget:
    """A number of UNet evaluations such as "200000", or a time such as "90s", "30m" or "1.5h".

    Raises:
        typer.BadParameter: the text is neither, or 0.
    """
    from seal_fast.text_triggers.search_settings import Budget

    if re.fullmatch(r"[0-9]{1,18}", text) and int(text):
        return Budget(evaluations=int(text))
    if (match := re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smh])", text)) and float(match[1]):
        return Budget(seconds=float(match[1]) * SECONDS[match[2]])
    raise typer.BadParameter(f"--budget is a number of UNet evaluations (200000) or a time (90s, 30m, 2h), not {text!r}")
