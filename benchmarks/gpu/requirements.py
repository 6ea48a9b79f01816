"""Name the requirements that this Python lacks, before an installation without an index fails for one of them.

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
FROM_THE_MACHINE = ("torch", "triton")
"""Packages that the machine brings; their own requirements are not checked."""


def missing(requirement: Requirement, known: set[str]) -> list[str]:
    """Requirements that are absent or have the wrong version: this one and all that it requires."""
    if requirement.name in known or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
        return []
    known.add(requirement.name)
    try:
        distribution = metadata.distribution(requirement.name)
    except metadata.PackageNotFoundError:
        return [str(requirement)]
    if not requirement.specifier.contains(distribution.version, prereleases=True):
        return [f"{requirement} (there is {distribution.version})"]
    needs = [] if requirement.name in FROM_THE_MACHINE else distribution.requires or []
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
