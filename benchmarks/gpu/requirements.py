"""Which requirements this Python lacks, so that an installation without an index says so before anything needs them.

python -m benchmarks.gpu.requirements
"""

from __future__ import annotations

import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
FOR_TESTS = ("pytest", "pytest-benchmark", "hypothesis", "peft", "accelerate")
THE_MACHINES = ("torch", "triton")
"""Whose own requirements are whoever installed them's business."""


def missing(requirement: Requirement, known: set[str]) -> list[str]:
    """What is absent or of the wrong version, of a requirement and of all it requires."""
    if requirement.name in known or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
        return []
    known.add(requirement.name)
    try:
        distribution = metadata.distribution(requirement.name)
    except metadata.PackageNotFoundError:
        return [str(requirement)]
    if not requirement.specifier.contains(distribution.version, prereleases=True):
        return [f"{requirement} (there is {distribution.version})"]
    needs = [] if requirement.name in THE_MACHINES else distribution.requires or []
    return [name for need in needs for name in missing(Requirement(need), known)]


def main() -> None:
    project = tomllib.loads(PROJECT.read_text())
    needs = [*project["build-system"]["requires"], *project["project"]["dependencies"], *FOR_TESTS]
    known: set[str] = set()
    lacking = [name for need in needs for name in missing(Requirement(need), known)]
    if lacking:
        sys.exit(f"missing: {', '.join(lacking)}; put their wheels into the folder too")


if __name__ == "__main__":
    main()
