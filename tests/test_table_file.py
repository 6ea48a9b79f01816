"""A table that grows by one result at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.table_file import grow_table, read_results, write_table


def test_an_interrupted_table_continues_where_it_stopped(tmp_path: Path) -> None:
    path, names, measured = tmp_path / "table.json", ("a", "b", "c"), list[str]()

    def measure(name: str) -> dict[str, int]:
        measured.append(name)
        if measured == ["c", "a"]:
            raise KeyboardInterrupt
        return {"length": len(measured)}

    with pytest.raises(KeyboardInterrupt):
        grow_table(path, {"seed": 1}, names, ("c", "a"), measure)
    assert read_results(path) == [{"name": "c", "length": 1}]
    grow_table(path, {"seed": 1}, names, names, measure)
    assert measured == ["c", "a", "a", "b"]
    content = json.loads(path.read_text())
    assert content["seed"] == 1
    assert [result["name"] for result in content["results"]] == ["a", "b", "c"]
    assert content["results"][2]["length"] == 1


def test_each_result_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    content = {
        "settings": {"scales": [0.5, 2]},
        "results": [{"name": "a", "rates": [{"rate": 1 / 3}]}, {"name": "b\n"}],
        "seeds": [],
    }
    write_table(path, content)
    expected = {**content, "results": [{"name": "a", "rates": [{"rate": 0.33333333}]}, {"name": "b\n"}]}
    assert json.loads(path.read_text()) == expected
    assert [line[:11] for line in path.read_text().splitlines()[2:5]] == ['"results": ', '{"name": "a', '{"name": "b']
    assert list(tmp_path.iterdir()) == [path]
