"""Pieces of a rendered page: notes, tables and cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.table_file import read_table

RESULTS = Path("benchmarks/results")
ABSENT = "-"


def read(name: str) -> dict[str, Any]:
    """The content of benchmarks/results/NAME.json, its machine's facts among the others."""
    content = read_table(RESULTS / f"{name}.json")
    return {**content.get("machine", {}), **content}


def note(name: str, **facts: Any) -> list[str]:
    """The text of benchmarks/results/notes/NAME.md, with `facts` in place of its {names}."""
    return [(RESULTS / "notes" / f"{name}.md").read_text().format(**facts)]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def number(value: float | None, digits: int) -> str:
    return ABSENT if value is None else f"{value:.{digits}f}"


def rate(value: dict[str, Any]) -> str:
    """A rate with its interval."""
    if value["rate"] is None:
        return "not measured"
    return f"{value['rate']:.2f} [{value['low']:.2f}, {value['high']:.2f}], n = {value['trials']}"


def starred(name: str, mark: bool) -> str:
    return f"{name} \\*" if mark else name
