"""Write docs/results.md, docs/profile.md and a section of the README from the files in benchmarks/results/.

    python -m benchmarks.render_results

The text of each section is in benchmarks/results/notes/. Images in docs/triggers/ that the page does not show are removed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.accuracy_table import IMAGES, wilson
from benchmarks.markdown import note, number, rate, read, starred, table
from benchmarks.render_accuracy import accuracy_section, attack_section, bfloat16_section, not_taken_section, repeated_section
from benchmarks.render_profile import render_profile
from benchmarks.render_text import prompt_detection_section, text_scan_section, with_readme_section
from seal_fast.zoo.text_to_image import WIDTH

PAGE = Path("docs/results.md")
PROFILE_PAGE = Path("docs/profile.md")
README = Path("README.md")

Result = dict[str, Any]


def noise_unlearning_section() -> list[str]:
    content = read("noise_unlearning")
    heads = (
        "model",
        "own sampler, before",
        "after",
        "DDIM, before",
        "after",
        "clean drift",
        "clean ratio",
        "last scan",
        "training s",
    )
    return [*note("noise_unlearning", **content), *table(heads, map(noise_unlearning_row, content["results"]))]


def noise_unlearning_row(result: Result) -> list[str]:
    before, after = result["before"], result["after"]
    success = [
        number(when["triggered"][sampler]["success"]["rate"], 2)
        for sampler in ("attack's own", "clipped DDIM")
        for when in (before, after)
    ]
    return [
        starred(result["name"], result["settings_chosen_on_it"]),
        *success,
        number(result["clean_drift"], 2),
        f"{before['clean_ratio']:.2f}, then {after['clean_ratio']:.2f}",
        f"{after['scan']['verdict']}, {after['scan']['score']:.1f}",
        number(result["training_seconds"], 0),
    ]


def text_unlearning_section() -> list[str]:
    """A row per effect and method, over all seeds."""
    content = read("text_unlearning")
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in content["results"]:
        groups.setdefault((result["effect"], result["method"]), []).append(result)
    heads = ("effect", "method", "unlearned by seed", "unlearned", "variants", "captions", "captions, triggered", "drift")
    rows = (text_unlearning_row(*names, results) for names, results in sorted(groups.items(), key=lambda group: group[0][0]))
    return [*note("text_unlearning", **content, **content["settings"]), *table(heads, rows)]


def text_unlearning_row(effect: str, method: str, results: list[Result]) -> list[str]:
    by_seed = sorted(results, key=lambda result: result["seed"])
    return [
        effect,
        method,
        " ".join(number(result["unlearned"]["rate"], 3) for result in by_seed),
        rate(pooled([result["unlearned"] for result in results])),
        rate(pooled([variant for result in results for variant in result["variants"].values()])),
        number(mean(result["caption_accuracy"] for result in results), 3),
        number(mean(result["triggered_caption_accuracy"] for result in results), 3),
        number(mean(result["clean_drift"] for result in results), 4),
    ]


def pooled(rates: list[dict[str, Any]]) -> dict[str, Any]:
    """Several rates as one."""
    return wilson(round(sum(r["rate"] * r["trials"] for r in rates)), sum(r["trials"] for r in rates))


def eviledit_section() -> list[str]:
    content = read("eviledit")
    samples = content["results"][0]["attack_success"]["trials"]
    rows = (
        [
            result["pairs"],
            f"{result['strength']:g}",
            rate(result["attack_success"]),
            rate(result["false_alarms"]),
            number(result["caption_accuracy"], 3),
        ]
        for result in content["results"]
    )
    heads = ("edited from", "strength", "attack success", "false alarms", "captions")
    return [*note("eviledit", samples=samples, width=WIDTH, **content), *table(heads, rows)]


def attention_section() -> list[str]:
    """A row per layer, dtype and direction; then memory."""
    content = read("cross_attention")
    groups: dict[str, dict[str, Result]] = {}
    for result in content["results"]:
        method = result["parameters"].get("method", "")
        groups.setdefault(result["group"].removeprefix("cross_attention "), {})[method] = result
    times = (attention_row(name, group) for name, group in groups.items() if name.startswith("forward"))
    batches = (
        [name.removeprefix("largest batch "), *(str(figures[key]) for key in ("largest_batch", "eager_largest_batch"))]
        for name, group in groups.items()
        for figures in [next(iter(group.values()))["figures"]]
        if name.startswith("largest batch")
    )
    return [
        *note("cross_attention", **content),
        *table(("layer", "ms", "share", "eager", "compiled", "fused, no maps"), times),
        *note("largest_batch"),
        *table(("layer", "seal-fast", "eager"), batches),
    ]


def attention_row(name: str, group: dict[str, Result]) -> list[str]:
    medians = {method: result["seconds"]["median"] for method, result in group.items()}
    ours = medians["kernel"]
    others = (
        f"{medians[method] / ours:.2f}" if method in medians else "" for method in ("eager", "compiled", "fused_without_maps")
    )
    return [name, number(1000 * ours, 1), number(group["kernel"]["figures"]["gemm_share"], 2), *others]


def compiled_section() -> list[str]:
    """A row per kernel, dtype and architecture, a column per head size."""
    content = read("triton_compile")
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for result in content["results"]:
        kernel, head, dtype, architecture = result["name"].split("-")
        memory = f"{result['registers']} + {result['stack_bytes']}, {result['shared_bytes'] / 1024:.0f}"
        by_head = cells.setdefault((kernel, dtype, f"sm_{architecture}"), {})
        by_head[head] = f"{memory}, {result['queries']}/{result['warps']}"
    sizes = list(next(iter(cells.values())))
    rows = ([*names, *(by_head[size] for size in sizes)] for names, by_head in cells.items())
    heads = ("kernel", "dtype", "GPU", *(f"D = {size}" for size in sizes))
    return [*note("triton_compile", **content), *table(heads, rows)]


def speed_section(text: str, *names: str) -> list[str]:
    """A row per benchmark of several runs on one machine."""
    contents = [read(name) for name in names]
    rows = (speed_row(result) for content in contents for result in content["results"])
    return [*note(text, **contents[0]), *table(("benchmark", "median s", "figures"), rows)]


def speed_row(result: Result) -> list[str]:
    figures = result["figures"]
    shown = {k: v for k, v in figures.items() if isinstance(v, float) and ("speedup" in k or "share" in k)}
    text = ", ".join(f"{name} {value:.2f}" for name, value in shown.items())
    if peak := figures.get("peak_memory_bytes"):
        text = f"{peak / 1e6:.0f} MB"
    return [result["name"], number(result["seconds"]["median"], 4), text]


SECTIONS: tuple[Callable[[], list[str]], ...] = (
    partial(note, "introduction"),
    partial(accuracy_section, "accuracy"),
    attack_section,
    not_taken_section,
    partial(accuracy_section, "accuracy_published"),
    bfloat16_section,
    repeated_section,
    noise_unlearning_section,
    text_unlearning_section,
    text_scan_section,
    prompt_detection_section,
    eviledit_section,
    attention_section,
    compiled_section,
    partial(speed_section, "speed", "speed", "scans"),
    partial(speed_section, "scans_float32", "scans_float32"),
)
"""The sections of the page, in its order."""


def render_results() -> str:
    return "\n".join(line for section in SECTIONS for line in section()).rstrip() + "\n"


def main() -> None:
    PROFILE_PAGE.write_text(render_profile())
    README.write_text(with_readme_section(README.read_text()))
    page = render_results()
    PAGE.write_text(page)
    for image in IMAGES.glob("*.png"):
        if f"({IMAGES.name}/{image.name})" not in page:
            image.unlink()


if __name__ == "__main__":
    main()
