"""One stage of the GPU benchmarks. It writes each result to PARTS/STAGE.json at once, so a time limit keeps the finished ones.

    python -m benchmarks.gpu.stages {device,ops,reversion,models,unlearning,scan} --parts DIR [--tiny]

`device` comes first, because other stages compare with the limits it measures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.device import REAL, TINY, Limits, Scale, describe

STAGES = ("device", "ops", "reversion", "models", "unlearning", "scan")


def results_of(stage: str, scale: Scale, parts: Path) -> Iterable[dict[str, Any]]:
    # imported here: a stage must not fail because of a module that only another stage needs
    if stage == "device":
        return [describe(scale)]
    if stage == "ops":
        from benchmarks.gpu import ops

        (device,) = json.loads((parts / "device.json").read_text())
        return ops.measure(Limits(**device["limits"]), scale)
    if stage == "unlearning":
        from benchmarks.gpu import unlearning

        return unlearning.measure(scale)
    if stage == "scan":
        from benchmarks.gpu import scanning

        return scanning.measure(scale)
    from benchmarks.gpu import reversion

    return reversion.measure_models(scale) if stage == "models" else reversion.measure(scale)


def run(stage: str, scale: Scale, parts: Path) -> None:
    results: list[dict[str, Any]] = []
    for result in results_of(stage, scale, parts):
        results.append(result)
        print(json.dumps(result), file=sys.stderr, flush=True)
        partial = parts / f"{stage}.partial"
        partial.write_text(json.dumps(results))
        partial.replace(parts / f"{stage}.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--parts", type=Path, required=True, help="Folder of the results.")
    parser.add_argument("--tiny", action="store_true", help="Use sizes that only prove that the stage runs.")
    arguments = parser.parse_args()
    arguments.parts.mkdir(parents=True, exist_ok=True)
    run(arguments.stage, TINY if arguments.tiny else REAL, arguments.parts)


if __name__ == "__main__":
    main()
