"""Condense a file that pytest-benchmark writes to median, quartiles and figures of each benchmark, and the machine once."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from benchmarks.machine import Machine

MACHINE = {field.name for field in fields(Machine)}
"""Figures that a benchmark reports about its machine: the same for every benchmark of a run."""


def condensed(raw: dict[str, Any], command: str) -> dict[str, Any]:
    """A table for `benchmarks.table_file` of pytest-benchmark's JSON content: no samples, no settings of the timer."""
    machine: dict[str, Any] = {"processor": raw["machine_info"]["cpu"]["brand_raw"]}
    for benchmark in raw["benchmarks"]:
        machine |= {name: value for name, value in benchmark["extra_info"].items() if name in MACHINE}
    return {"command": command, "machine": machine, "results": [_result(benchmark) for benchmark in raw["benchmarks"]]}


def _result(benchmark: dict[str, Any]) -> dict[str, Any]:
    stats = benchmark["stats"]
    # functions among the parameters cannot be stored; the name holds theirs
    parameters = {name: value for name, value in (benchmark["params"] or {}).items() if "UNSERIALIZABLE" not in str(value)}
    return {
        "name": benchmark["name"],
        "group": benchmark["group"],
        "parameters": parameters,
        "seconds": {name: stats[name] for name in ("median", "q1", "q3")},
        "rounds": stats["rounds"],
        "figures": {name: value for name, value in benchmark["extra_info"].items() if name not in MACHINE},
    }
