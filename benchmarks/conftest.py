"""The files that benchmarks write: without the host's name, without the samples behind each median."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from benchmarks.benchmark_file import condensed
from benchmarks.table_file import write_table


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Leave out the host's name: result files are published."""
    for private in ("node", "release"):
        machine_info.pop(private, None)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Condense the file that pytest-benchmark has just written (its hook wraps this one)."""
    path = session.config.getoption("benchmark_json")
    if path is None or not path.exists():
        return
    content = json.loads(path.read_text())
    # no benchmark ran: the file is that of an earlier run
    if "benchmarks" in content:
        command = shlex.join(["python", "-m", "pytest", *map(str, session.config.invocation_params.args)])
        write_table(path, condensed(content, command))
