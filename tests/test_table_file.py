"""A table that grows row by row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.table_file import grow_table, read_rows


def test_an_interrupted_table_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path, names, measured = tmp_path / "table.json", ("a", "b", "c"), list[str]()

    def measure(name: str) -> dict[str, int]:
        measured.append(name)
        if measured == ["c", "a"]:
            raise KeyboardInterrupt
        return {"length": len(measured)}

    with pytest.raises(KeyboardInterrupt):
        grow_table(path, {"seed": 1}, names, ("c", "a"), measure)
    assert read_rows(path) == [{"name": "c", "length": 1}]
    grow_table(path, {"seed": 1}, names, names, measure)
    assert measured == ["c", "a", "a", "b"]
    content = json.loads(path.read_text())
    assert content["seed"] == 1
    assert [row["name"] for row in content["rows"]] == ["a", "b", "c"]
    assert content["rows"][2]["length"] == 1
