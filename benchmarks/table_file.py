"""The file of a table that grows by one row at a time, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
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
