"""Tables of docs/results.md and of the README on text triggers that nobody told: scans of models, and detection of prompts.

A section of docs/results.md is left out while its file is not in benchmarks/results/. The README says that it is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from benchmarks.markdown import ABSENT, RESULTS, note, number, read, table
from benchmarks.text_scan_table import counts
from benchmarks.text_zoo import ROLES
from seal_fast.text_triggers.rate import Rate
from seal_fast.verdict import Verdict

Result = dict[str, Any]

TEXT_SCAN = "text_scan.json"
BEGIN, END = "<!-- text scans, by python -m benchmarks.render_results -->", "<!-- end of text scans -->"
"""Marks of the README's section."""
ACTIVE = 0.5
"""A found text that shows a true effect in so many images activates the backdoor, whatever its name."""
TRIGGER_HEADS = ("model", "effect", "trigger", "group", "named", "verdict", "rank by round", "rank by norm", "by encoder", "of")
UNLEARNED_HEADS = ("unlearned", "found", "success after", "captions before", "captions after", "scanned again", "seconds")
BENIGN_HEADS = ("benign model", "verdict", "reason", "AMDET")


def text_scan_section() -> list[str]:
    """Counts of every role, then a row per true trigger, per model that was unlearned and scanned again, per benign model."""
    if not (RESULTS / TEXT_SCAN).exists():
        return []
    content = read("text_scan")
    results = content["results"]
    return [
        *note("text_scan", **content),
        *(line for role in ROLES for line in count_lines(role, [one for one in results if one["role"] == role])),
        "",
        *table(TRIGGER_HEADS, (trigger_row(one, trigger) for one in results for trigger in one["triggers"])),
        *table(UNLEARNED_HEADS, (unlearned_row(one) for one in results if one["unlearned"])),
        *table(BENIGN_HEADS, (benign_row(one) for one in results if not one["triggers"])),
    ]


def readme_section() -> list[str]:
    """What was found in models that played no part in the development: a row per kind of trigger, one for benign models."""
    results = read("text_scan")["results"] if (RESULTS / TEXT_SCAN).exists() else []
    found = counts([one for one in results if one["role"] == "test"])
    if not found:
        return ["Scans of text-to-image models: not measured yet."]
    benign = found.pop("benign", {})
    heads = ("triggers of text-to-image models", "named", "not named, and the model is not reported clean")
    rows = [(group, with_count(rates["named"]), with_count(rates["missed, not clean"])) for group, rates in found.items()]
    verdicts = [f"{verdict} {with_count(rate)}" for verdict, rate in benign.items()]
    return [*table(heads, rows), *([f"Benign text-to-image models are reported {', '.join(verdicts)}."] if verdicts else [])]


def with_count(rate: Rate) -> str:
    return f"{rate}, n = {rate.trials}"


def with_readme_section(page: str) -> str:
    """The README with its section on text scans between the marks."""
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    return "\n".join([f"{before}{BEGIN}", *readme_section(), f"{END}{after}"])


def count_lines(role: str, results: list[Result]) -> Iterator[str]:
    for group, rates in counts(results).items():
        yield f"- {role}, {group}: " + "; ".join(f"{what} {with_count(rate)}" for what, rate in rates.items())
    if results:
        seconds, evaluations = (median(one[key] for one in results) for key in ("seconds", "evaluations"))
        yield f"- {role}: median {seconds:.0f} s and {evaluations:.0f} UNet evaluations per scan"
        found = [one for result in results for one in result["found"]]
        wrong = sum(not one["names"] and max(one["shows"].values(), default=0.0) < ACTIVE for one in found)
        yield f"- {role}: {wrong} of {len(found)} found triggers neither name a true trigger nor activate its backdoor"
        yield f"- {role}: {unlearned_clean(results)}"
        yield f"- {role}, AMDET: " + "; ".join(f"{kind} {flagged(results, kind)}" for kind in ("backdoored", "benign"))


def unlearned_clean(results: list[Result]) -> str:
    """How many models are clean after what was found in them is unlearned, as a phrase."""
    after = [one["unlearned"] for one in results if one["unlearned"] and one["triggers"]]
    clean = sum(one["verdict"] == Verdict.CLEAN for one in after)
    lost = max((one["captions"][0] - one["captions"][1] for one in after), default=0.0)
    return (
        f"{clean} of {len(after)} backdoored models are clean when what the scan found is unlearned and they are scanned again;"
        f" their captions lose at most {100 * lost:.1f} points"
    )


def flagged(results: list[Result], kind: str) -> str:
    """How many models of a kind AMDET reports backdoored."""
    outcomes = [
        one["amdet"]["backdoored"] for one in results if one["amdet"] and bool(one["triggers"]) == (kind == "backdoored")
    ]
    return f"{sum(outcomes)} of {len(outcomes)} flagged"


def trigger_row(result: Result, trigger: Result) -> list[str]:
    ranks, nulls = trigger["rounds"], trigger["null_ranks"]
    return [
        result["name"],
        trigger["effect"],
        f"`{trigger['trigger']}`",
        trigger["group"],
        "yes" if trigger["named"] else "no",
        f"{result['verdict']} ({result['rule']})",
        ", ".join(f"{one['name']} {one['rank']}/{one['candidates']}" for one in ranks) or ABSENT,
        number(nulls["embedding norm"], 0),
        number(nulls["encoder alone"], 0),
        str(nulls["candidates"]),
    ]


def unlearned_row(result: Result) -> list[str]:
    """What became of a model whose found triggers were unlearned."""
    after = result["unlearned"]
    before, captions = (f"{share:.3f}" for share in after["captions"])
    return [
        result["name"],
        ", ".join(f"`{one['trigger']}`" for one in result["found"]),
        ", ".join(f"{name} {share:.3f}" for name, share in after["attack_success"].items()) or ABSENT,
        before,
        captions,
        f"{after['verdict']} ({after['rule']})",
        number(after["seconds"], 0),
    ]


def benign_row(result: Result) -> list[str]:
    outcome = result["amdet"]
    amdet = ABSENT if outcome is None else "backdoored" if outcome["backdoored"] else "clean"
    return [result["name"], f"{result['verdict']} ({result['rule']})", result["reason"].replace("|", "\\|"), amdet]


def prompt_detection_section() -> list[str]:
    """A row per attack and model, a column per method."""
    if not (RESULTS / "prompt_detection.json").exists():
        return []
    content = read("prompt_detection")
    attacks = [(result, attack) for result in content["results"] for attack in result["attacks"]]
    methods = list(attacks[0][1]["methods"])
    rows = (
        [result["name"], result["role"], attack["effect"], *(auroc(attack["methods"][name]) for name in methods)]
        for result, attack in attacks
    )
    return [*note("prompt_detection", **content), *table(("model", "role", "effect", *methods), rows)]


def auroc(figures: Result) -> str:
    """AUROC against clean prompts, and against prompts with rare strings, with their intervals."""
    values = (figures["clean"], figures["rare"])
    return " / ".join(f"{value['auroc']:.3f} [{value['low']:.3f}, {value['high']:.3f}]" for value in values)
