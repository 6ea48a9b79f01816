"""The file of a table: facts that hold for all results first, then one result per line.

A table grows by one result at a time, so an interrupted run continues where it stopped. Floats keep eight significant digits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DIGITS = 8


def rounded(value: Any) -> Any:
    """The value with every float in it rounded to DIGITS significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def read_table(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results so far; none if there is no file yet."""
    return read_table(path)["results"] if path.exists() else []


def write_table(path: Path, content: dict[str, Any]) -> None:
    """Replace the file, whole or not at all. Every list of dictionaries in `content` gets a line per dictionary."""
    partial = path.with_name(path.name + ".partial")
    entries = (f"{json.dumps(name)}: {_lines(rounded(value))}" for name, value in content.items())
    partial.write_text("{\n" + ",\n".join(entries) + "\n}\n")
    partial.replace(path)


def _lines(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n]"
    return json.dumps(value)


def grow_table(
    path: Path, head: dict[str, Any], names: Sequence[str], only: Sequence[str], measure: Callable[[str], dict[str, Any]]
) -> None:
    """Measure what the file lacks of `only` and write each result as soon as it is known, in the order of `names`."""
    results = {result["name"]: result for result in read_results(path)}
    for name in only:
        if name not in results:
            results[name] = {"name": name, **measure(name)}
            print(json.dumps(results[name]), flush=True)
            write_table(path, {**head, "results": [results[name] for name in names if name in results]})
