"""Collect the results of all stages in one file and print them as a short table.

    python -m benchmarks.gpu.report --parts DIR --out FILE [--commit HASH] [--dry-run]

Exits with 1 unless every stage succeeded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.stages import STAGES

GOOD = ("ok", "skipped")


def collected(parts: Path, commit: str | None, dry_run: bool) -> dict[str, Any]:
    """All results, and each stage's status from the lines `stage<TAB>status<TAB>seconds<TAB>detail` of PARTS/stages.tsv."""
    lines = [line.split("\t") for line in (parts / "stages.tsv").read_text().splitlines()]
    stages = {name: {"status": status, "seconds": int(seconds), "detail": detail} for name, status, seconds, detail in lines}
    results = {name: json.loads(path.read_text()) for name in STAGES if (path := parts / f"{name}.json").exists()}
    device = results.pop("device", [{}])[0]
    if commit is not None:
        device["commit"] = commit
    return {"schema_version": 1, "dry_run": dry_run, "device": device, "stages": stages, **results}


def microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.0f} us"


def table(results: dict[str, Any]) -> list[str]:
    lines = []
    if limits := results["device"].get("limits"):
        rates = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in limits["gemm"].items())
        lines += [f"{results['device']['device']}: copy {limits['bandwidth'] / 1e12:.2f} TB/s, {rates}"]
    for result in results.get("ops", ()):
        what = f"{result['op']} {result.get('layer', result['shape'])} {result['dtype']} {result['pass']}"
        beside = ", ".join(f"{speedup:.2f}x {name}" for name, speedup in result["speedups"].items())
        lines.append(
            f"{what}: {microseconds(result['seconds']['seal_fast'])}, {result['share_of_bandwidth']:.0%} of copy; {beside}"
        )
    for result in results.get("reversion", ()):
        for name, seconds in result["seconds_per_iteration"].items():
            faster = f", {result['speedups'][name]:.2f}x published" if name in result["speedups"] else ""
            lines.append(f"{result['stage']} {name}: {1e3 * seconds:.2f} ms an iteration{faster}")
    for result in results.get("models", ()):
        beside = ", ".join(f"{name} {speedup:.2f}x" for name, speedup in result["speedups"].items())
        lines.append(f"{result['models']} models: {beside}")
    for result in results.get("unlearning", ()):
        time = (
            result.get("failed") or f"{1e3 * result['seconds_per_pair']:.0f} ms a pair, {result['speedup'] or 0:.2f}x published"
        )
        memory = f", {result['peak_bytes'] / 1e9:.1f} GB" if result.get("peak_bytes") else ""
        lines.append(f"{result['contender']}: {time}{memory}")
    for result in results.get("scan", ()):
        truth = "backdoored" if result["backdoored"] else "benign"
        lines.append(f"scan {result['model']} ({truth}): {result['verdict']} in {result['seconds']:.1f} s")
    for name, result in results["stages"].items():
        lines.append(f"stage {name}: {result['status']}, {result['seconds']} s{result['detail'] and ': ' + result['detail']}")
    failed = [
        f"{result.get('stage') or result.get('models')} {name}: {reason}"
        for stage in ("reversion", "models")
        for result in results.get(stage, ())
        for name, reason in result["failed"].items()
    ]
    return lines + [f"could not run: {line}" for line in failed]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="Commit, where the folder is no checkout.")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args(words)
    results = collected(arguments.parts, arguments.commit, arguments.dry_run)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(table(results)))
    sys.exit(any(stage["status"] not in GOOD for stage in results["stages"].values()))


if __name__ == "__main__":
    main()
