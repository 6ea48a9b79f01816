"""The text of docs/profile.md, from the files of benchmarks.profile_scan and benchmarks.evaluations."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import ABSENT, note, read, table


def profile_section(name: str) -> list[str]:
    """Two rows per architecture: the published program and seal-fast. Then whole reversions."""
    content = read(name)
    rates = {dtype: content[f"{dtype}_matrix_rate"] / 1e9 for dtype in ("float32", "bfloat16")}
    parts = list(content["cases"][0]["loops"]["published"]["shares"])
    rows = (loop_row(case, loop) for case in content["cases"] for loop in case["loops"])
    return [
        *note(name, **rates, **content),
        *table(["network", "loop", "ms per image", "FLOPs needed", "GFLOP/s", *parts], rows),
        *whole_scans(content["scans"]),
    ]


def loop_row(case: dict[str, Any], name: str) -> list[str]:
    loop = case["loops"][name]
    needed = min(other["flops"] for other in case["loops"].values())
    return [
        f"{case['name']}, {case['parameters'] / 1e6:.1f} M",
        name,
        f"{1000 * loop['seconds'] / case['images']:.2f}",
        f"{needed / loop['flops']:.0%}",
        f"{loop['flops'] / loop['seconds'] / 1e9:.0f}",
        *(f"{share:.0%}" for share in loop["shares"].values()),
    ]


def whole_scans(scans: list[dict[str, Any]]) -> list[str]:
    """A row per model."""
    stages = list(dict.fromkeys(stage for scan in scans for stage in scan["stages"]))
    rows = (
        [
            scan["name"],
            f"{scan['evaluations']:,}",
            *(f"{scan['stages'][stage]:.1f} s" if stage in scan["stages"] else ABSENT for stage in stages),
            *(f"{share:.0%}" for share in scan["shares"].values()),
        ]
        for scan in scans
    )
    return [*note("profile_scans"), *table(["model", "images denoised", *stages, *scans[0]["shares"]], rows)]


def evaluations_section() -> list[str]:
    """A row per model, a column per search."""
    content = read("evaluations")
    searches = list(content["results"][0]["searches"])
    rows = (
        [
            result["name"],
            result["role"],
            *(f"{found['images']:,} ({found['collapse']:.1f})" for found in result["searches"].values()),
        ]
        for result in content["results"]
    )
    text = note("evaluations", published=content["published_images"], command=content["command"])
    return [*text, *table(["model", "role", *searches], rows)]


def render_profile() -> str:
    sections = profile_section("profile"), profile_section("profile_float32"), evaluations_section()
    return "\n".join(line for section in sections for line in section).rstrip() + "\n"
