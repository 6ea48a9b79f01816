"""The text of docs/profile.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PROFILE_TITLE = "# Where the time goes"
PROFILE = """
`{command}` on one thread of {processor}: iterations of estimation, forward pass and gradient
of a batch of pairs, by the published loop in float32 and by seal-fast as it comes, in turns; the fastest of a few runs.
Milliseconds are the processor's; shares are of one profiled run, in which Python waits for the profiler too. FLOPs are
counted by torch; needed are those of a forward pass and of the input's gradient, the rest is gradients of frozen weights.
GFLOP/s are of those counted, of which `winograd_convolution` does a quarter; a matrix product reaches {gemm:.0f} in float32 and
{half:.0f} in bfloat16.
"""
PROFILE_WITHOUT_BFLOAT16 = """
## Without bfloat16

`{command}` on one thread of another {processor}, which does not multiply bfloat16, so both programs
calculate in float32: the same figures. A matrix product reaches {gemm:.0f} GFLOP/s in float32.
"""


def profile_page(introduction: str, content: dict[str, Any]) -> list[str]:
    """Two rows per architecture: published, seal-fast."""
    gemm, half = (content[f"{dtype}_matrix_rate"] / 1e9 for dtype in ("float32", "bfloat16"))
    parts = list(content["cases"][0]["loops"]["published"]["shares"])
    lines = [
        introduction.format(gemm=gemm, half=half, **content),
        "| network | loop | ms per image | FLOPs needed | GFLOP/s | " + " | ".join(parts) + " |",
        "|---" * (5 + len(parts)) + "|",
    ]
    for case in content["cases"]:
        needed = min(loop["flops"] for loop in case["loops"].values())
        for name, loop in case["loops"].items():
            told = [
                f"{case['name']}, {case['parameters'] / 1e6:.1f} M",
                name,
                f"{1000 * loop['seconds'] / case['images']:.2f}",
                f"{needed / loop['flops']:.0%}",
                f"{loop['flops'] / loop['seconds'] / 1e9:.0f}",
                *(f"{share:.0%}" for share in loop["shares"].values()),
            ]
            lines.append("| " + " | ".join(told) + " |")
    return [*lines, *whole_scans(content["scans"])]


WHOLE_SCANS = """
Whole reversions at the default settings, on the same thread: seconds of each stage, and the shares of all of them together
in a second, profiled run, where Python waits for the profiler at every op.
"""


def whole_scans(scans: list[dict[str, Any]]) -> list[str]:
    """A row per model."""
    stages = list(dict.fromkeys(stage for scan in scans for stage in scan["stages"]))
    columns = ["model", "images denoised", *stages, *scans[0]["shares"]]
    lines = [WHOLE_SCANS, "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for scan in scans:
        spent = [f"{scan['stages'][stage]:.1f} s" if stage in scan["stages"] else "-" for stage in stages]
        told = [scan["name"], f"{scan['evaluations']:,}", *spent, *(f"{share:.0%}" for share in scan["shares"].values())]
        lines.append("| " + " | ".join(told) + " |")
    return lines


EVALUATIONS = """
## What each part saves

`{command}`: images put through the denoiser for one model, as the default search comes and with one
part at a time undone; in brackets the collapse that is found. The published program takes {published:,} for every model.
"""


def evaluations_page(content: dict[str, Any]) -> list[str]:
    """A row per model, a column per way."""
    ways = list(content["rows"][0]["ways"])
    lines = [
        EVALUATIONS.format(published=content["published_images"], **content),
        "| model | role | " + " | ".join(ways) + " |",
        "|---" * (2 + len(ways)) + "|",
    ]
    for row in content["rows"]:
        told = [f"{found['images']:,} ({found['collapse']:.1f})" for found in row["ways"].values()]
        lines.append(f"| {row['name']} | {row['role']} | " + " | ".join(told) + " |")
    return lines


def render_profile(results: Path) -> str:
    """From the files in the folder of results."""

    def read(name: str) -> dict[str, Any]:
        return json.loads((results / f"{name}.json").read_text())

    profiles = profile_page(PROFILE, read("profile")), profile_page(PROFILE_WITHOUT_BFLOAT16, read("profile_float32"))
    pages = *profiles, evaluations_page(read("evaluations"))
    return "\n".join([PROFILE_TITLE, *(line for page in pages for line in page)]) + "\n"
