"""Settings of all benchmarks."""

from __future__ import annotations

from typing import Any


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """A result file is published: the host's name is nobody's business."""
    for private in ("node", "release"):
        machine_info.pop(private, None)
