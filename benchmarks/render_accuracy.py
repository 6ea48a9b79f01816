"""Tables of docs/results.md on how well noise triggers are found, from the files of benchmarks.accuracy_table."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.markdown import ABSENT, note, number, rate, read, starred, table

Result = dict[str, Any]

HEADS = (
    "model",
    "role",
    "attack success",
    "verdict",
    "score / limit",
    "diversity collapse",
    "sampler",
    "M_r",
    "V_r",
    "gamma",
    "relative L2",
    "cosine similarity",
    "seconds",
)
PARTS = {
    "all": "all models, benign ones left out of their own calibration",
    "held out": "published attacks at published strength on held-out models (own seeds, images, triggers, targets)",
    "hard": "weak, small, learned or rare triggers, other predictions and processes, latents; models used for nothing else",
    "all, without the correction": "all, mean + 3 standard deviations without the correction",
}


def accuracy_section(name: str) -> list[str]:
    """The results of one preset: a summary, a row per model, and input detection."""
    content = read(name)
    results = content["results"]
    lines = [*note(name, **content), *summary_lines(content["summary"]), "", *table(HEADS, map(model_row, results))]
    backdoored = [result for result in results if "reverted" in result]
    return lines + input_section(backdoored, content["inputs_per_side"])


def summary_lines(summary: dict[str, Any]) -> list[str]:
    lines = []
    for name, title in PARTS.items():
        if part := summary.get(name):
            found = f"; median relative L2 {part['relative_l2']:.2f}, cosine {part['cosine']:.3f}" if part.get("cosine") else ""
            lines.append(f"- {title}: {model_rates(part)}{found}")
    return lines + [f"- calibrated {name}: {model_rates(part)}" for name, part in summary["transfer"].items()]


def model_rates(part: dict[str, Any]) -> str:
    return f"model TPR {rate(part['tpr'])}; TNR {rate(part['tnr'])}"


def model_row(result: Result) -> list[str]:
    evidence, reverted = result["evidence"], result.get("reverted", {})
    score = ABSENT if result["score"] is None else f"{result['score']:.1f} / {result['threshold']:.1f}"
    return [
        starred(result["name"], result.get("before_target_refinement", False)),
        result["role"],
        number(result.get("attack_success"), 2),
        result["verdict"] or ABSENT,
        score,
        number(evidence.get("collapse"), 1),
        evidence.get("sampler") or ABSENT,
        number(evidence["M_r"], 4),
        number(evidence["V_r"], 5),
        number(evidence["gamma_mean"], 2),
        number(reverted.get("relative_l2"), 2),
        number(reverted.get("cosine"), 2),
        number(result["seconds"], 0),
    ]


def input_section(backdoored: list[Result], inputs: int) -> list[str]:
    """Input detection with recovered and true triggers and with the null baselines."""
    baselines = list(backdoored[0]["baselines"])
    heads = ["model", "recovered trigger", "true trigger", *(f"{name} (relative L2, cosine)" for name in baselines)]
    return [*note("inputs", inputs=f"{inputs:,}"), *table(heads, (input_row(result, baselines) for result in backdoored))]


def input_row(result: Result, baselines: list[str]) -> list[str]:
    true = result.get("true_trigger_inputs")
    cells = [result["name"], input_rates(result["reverted"]["inputs"]), ABSENT if true is None else input_rates(true)]
    for name in baselines:
        found = result["baselines"][name]
        cells.append(f"{input_rates(found['inputs'])} ({found['relative_l2']:.2f}, {found['cosine']:.2f})")
    return cells


def input_rates(inputs: dict[str, Any]) -> str:
    return f"{inputs['tpr']['rate']:.3f} / {inputs['tnr']['rate']:.3f}"


def attack_section() -> list[str]:
    """Detection and closeness per attack, with an image of the least close recovered trigger."""
    results = read("accuracy")["results"]
    methods = list(dict.fromkeys(result["method"] for result in results if result["method"] is not None))
    heads = (
        "attack",
        "found",
        "lowest attack success",
        "median relative L2",
        "median cosine similarity",
        "least close trigger",
    )
    rows = (attack_row(method, [result for result in results if result["method"] == method]) for method in methods)
    return [*note("attacks"), *table(heads, rows)]


def attack_row(method: str, results: list[Result]) -> list[str]:
    reverted = [result["reverted"] for result in results]
    least_close = min(results, key=lambda result: result["reverted"]["cosine"])["name"]
    return [
        method,
        f"{sum(result['verdict'] == 'backdoored' for result in results)} of {len(results)}",
        number(min(result["attack_success"] for result in results), 2),
        number(median(trigger["relative_l2"] for trigger in reverted), 2),
        number(median(trigger["cosine"] for trigger in reverted), 2),
        f"![{least_close}](triggers/{least_close}.png) {least_close}",
    ]


def not_taken_section() -> list[str]:
    """Trainings whose model is evidence of nothing."""
    content = read("not_taken")
    heads = ["attack", "process", "px", "trigger", "target", "poison rate", "steps", "batch", "learning rate"]
    return [
        *note("not_taken", **content),
        *table([*heads, "attack success", "clean ratio"], map(training_row, content["results"])),
    ]


def training_row(result: Result) -> list[str]:
    schedule, quality = result["schedule"], result["quality"]
    return [
        starred(result["method"], result["from_log"]),
        result["process"],
        str(result["size"]),
        result["trigger"] if result["scale"] == 1 else f"{result['trigger']} x {result['scale']:g}",
        result["target"],
        f"{schedule['poison_share']:.0%}",
        str(schedule["steps"]),
        str(schedule["batch"]),
        f"{schedule['learning_rate']:g}",
        number(quality["attack_success"], 2),
        number(quality["clean_ratio"], 2),
    ]


def bfloat16_section() -> list[str]:
    """The models whose verdict under bfloat16 differs."""
    content, above = read("accuracy_bfloat16"), {result["name"]: result for result in read("accuracy")["results"]}
    pairs = [(above[result["name"]], result) for result in content["results"]]
    other = [pair for pair in pairs if pair[0]["verdict"] != pair[1]["verdict"]]
    heads = ("model", "role", "float32", "bfloat16", "collapse in float32", "collapse in bfloat16")
    rows = (
        [
            pair[0]["name"],
            pair[0]["role"],
            *(result["verdict"] for result in pair),
            *(number(result["evidence"]["collapse"], 1) for result in pair),
        ]
        for pair in other
    )
    return [*note("accuracy_bfloat16", same=len(pairs) - len(other), all=len(pairs), **content), *table(heads, rows)]


def repeated_section() -> list[str]:
    """Scans of the same models with other seeds."""
    content = read("repeated_scans")
    first, *_, last = content["seeds"]
    heads = ("model", "role", "attack", "correct verdicts", "diversity collapse")
    rows = (
        [
            result["name"],
            result["role"],
            result["method"] or ABSENT,
            rate(result["right"]),
            ", ".join(f"{value:.1f}" for value in result["collapse"]),
        ]
        for result in content["results"]
    )
    return [*note("repeated_scans", first=first, last=last, **content), *table(heads, rows)]
