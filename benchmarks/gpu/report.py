"""results.json from what the stages left, and a short table of it.

    python -m benchmarks.gpu.report --parts DIR --out FILE [--commit HASH] [--dry-run]

Exits with 1 unless every stage went well.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.stages import STAGES

GOOD = ("ok", "skipped")


def collected(parts: Path, commit: str | None, dry_run: bool) -> dict[str, Any]:
    """All rows, and how each stage went, from the lines `stage<TAB>status<TAB>seconds<TAB>detail` of PARTS/stages.tsv."""
    lines = [line.split("\t") for line in (parts / "stages.tsv").read_text().splitlines()]
    stages = {name: {"status": status, "seconds": int(seconds), "detail": detail} for name, status, seconds, detail in lines}
    rows = {name: json.loads(path.read_text()) for name in STAGES if (path := parts / f"{name}.json").exists()}
    device = rows.pop("device", [{}])[0]
    if commit is not None:
        device["commit"] = commit
    return {"schema_version": 1, "dry_run": dry_run, "device": device, "stages": stages, **rows}


def microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.0f} us"


def table(results: dict[str, Any]) -> list[str]:
    lines = []
    if limits := results["device"].get("limits"):
        rates = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in limits["gemm"].items())
        lines += [f"{results['device']['device']}: copy {limits['bandwidth'] / 1e12:.2f} TB/s, {rates}"]
    for row in results.get("ops", ()):
        what = f"{row['op']} {row.get('layer', row['shape'])} {row['dtype']} {row['pass']}"
        beside = ", ".join(f"{speedup:.2f}x {name}" for name, speedup in row["speedups"].items())
        lines.append(f"{what}: {microseconds(row['seconds']['seal_fast'])}, {row['share_of_bandwidth']:.0%} of copy; {beside}")
    for row in results.get("reversion", ()):
        for name, seconds in row["seconds_per_iteration"].items():
            faster = f", {row['speedups'][name]:.2f}x published" if name in row["speedups"] else ""
            lines.append(f"{row['stage']} {name}: {1e3 * seconds:.2f} ms an iteration{faster}")
    for row in results.get("models", ()):
        beside = ", ".join(f"{name} {speedup:.2f}x" for name, speedup in row["speedups"].items())
        lines.append(f"{row['models']} models: {beside}")
    for row in results.get("unlearning", ()):
        told = row.get("failed") or f"{1e3 * row['seconds_per_pair']:.0f} ms a pair, {row['speedup'] or 0:.2f}x published"
        memory = f", {row['peak_bytes'] / 1e9:.1f} GB" if row.get("peak_bytes") else ""
        lines.append(f"{row['contender']}: {told}{memory}")
    for row in results.get("scan", ()):
        truth = "backdoored" if row["backdoored"] else "benign"
        lines.append(f"scan {row['model']} ({truth}): {row['verdict']} in {row['seconds']:.1f} s")
    for name, row in results["stages"].items():
        lines.append(f"stage {name}: {row['status']}, {row['seconds']} s{row['detail'] and ': ' + row['detail']}")
    failed = [
        f"{row.get('stage') or row.get('models')} {name}: {why}"
        for kind in ("reversion", "models")
        for row in results.get(kind, ())
        for name, why in row["failed"].items()
    ]
    return lines + [f"could not run: {line}" for line in failed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="Where the checkout cannot tell.")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    results = collected(arguments.parts, arguments.commit, arguments.dry_run)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(table(results)))
    sys.exit(any(stage["status"] not in GOOD for stage in results["stages"].values()))


if __name__ == "__main__":
    main()
