"""The file of a table that grows by one row at a time, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows so far; none if there is no file yet."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def write_table(path: Path, content: dict[str, Any]) -> None:
    """Replace the file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


def grow_table(
    path: Path, head: dict[str, Any], names: Sequence[str], only: Sequence[str], measure: Callable[[str], dict[str, Any]]
) -> None:
    """Measure every row of `only` that the file lacks and write it as soon as it is there, in the order of `names`."""
    rows = {row["name"]: row for row in read_rows(path)}
    for name in only:
        if name not in rows:
            rows[name] = {"name": name, **measure(name)}
            print(json.dumps(rows[name]), flush=True)
            write_table(path, {**head, "rows": [rows[name] for name in names if name in rows]})
