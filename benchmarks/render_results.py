"""Write docs/results.md and docs/profile.md from the files in benchmarks/results/.

python -m benchmarks.render_results
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.accuracy_table import wilson
from benchmarks.render_profile import render_profile
from seal_fast.zoo.text_to_image import WIDTH

RESULTS = Path("benchmarks/results")
PAGE = Path("docs/results.md")
PROFILE_PAGE = Path("docs/profile.md")

INTRODUCTION = """# Results

Made by `python -m benchmarks.render_results` from `benchmarks/results/`. Rates carry 95% Wilson intervals. The attack
success of every backdoored model was measured before (`zoo/manifest.json`, and per attack below). Verdicts need benign
models only; each is calibrated without the row itself. Where fewer than two benign models that compare were left, the
verdict is "-", or with the default preset backdoored if the trigger surely fires, else inconclusive. An inconclusive
verdict counts as wrong.

Seconds are those of a machine busy with other work.
"""

NOTES = {
    "accuracy": """Judged by collapse: how many times more alike the reverted trigger makes the model's samples. The
method was chosen while looking at the models of role "development" or "calibration"; those of role "test" were used for
nothing. Rows that are not in `zoo/` come back with `seal-fast zoo build OUT --only NAME`.

Eight models of the held-out families were judged wrongly at first, and the method was mended while looking at them: the benign
held-16, held-16-benign-a, -b, -d and -h, and the backdoored held-16-troj-flag, held-16-troj-patch and held-16-villan-ode. They
count as development. So do the latent models hard-16-ldm and hard-16-ldm-ode: the backdoored one was called clean while the
reversion took latents for images in [-1, 1]. Its trigger is found in latents and drawn decoded. The limits for
kinds with few or no benign models were chosen knowing what benign EDM models reach, so hard-16-edm-benign-a is development too.
large-64-troj was called clean: a model that takes narrowed noise for whole is inconclusive since, and this one development.

Of four backdoored models of 64 px none has its own trigger reverted: in such networks many wrong images are fixed points.
deep-64-bad, which goes down to 8 px as published networks do, was called clean at first. Climbing from a fixed point that fires
from some noises was made looking at it, and finds a shift that surely fires. In deep-64-bad-flag, a model of the same kind that
was scanned once, after that, nothing was found. So above 32 px no model is called clean.

Rows of models that are not in `zoo/` are older than climbing, but for deep-64, deep-64-bad and deep-64-bad-flag, and than the
convolutions that float32 runs with now. Where nothing is climbed from, the search is as before; so it is in large-64-troj.
large-64 and large-64-bad were not looked at again.
""",
    "accuracy_published": """Judged by M_r and V_r against mean + 3 standard deviations, corrected for the small pool as
Student's prediction interval is.
""",
}

BASELINES = """Input columns give TPR / TNR over 10,000 triggered and 10,000 clean inputs: detection with the reverted trigger,
with the true one (the optimum), and with triggers that needed no reversion.
"""

NOT_TAKEN = """Trainings that gave no evidence, by `python -m benchmarks.not_taken`: the attack made its target of fewer than
90% of the triggered samples, or clean samples lay more than 2 times as far from the images as fresh ones (32 samples each).
These models were not scanned. Rows with an asterisk were taken from the logs of trainings before there was that command.
"""


def rate(value: dict[str, Any]) -> str:
    if value["rate"] is None:
        return "not measured"
    return f"{value['rate']:.2f} [{value['low']:.2f}, {value['high']:.2f}], n = {value['trials']}"


def inputs(row: dict[str, Any]) -> str:
    return f"{row['inputs']['tpr']['rate']:.3f} / {row['inputs']['tnr']['rate']:.3f}"


HEADS = (
    "model",
    "role",
    "success",
    "verdict",
    "score / limit",
    "collapse",
    "sampler",
    "M_r",
    "V_r",
    "gamma",
    "relative L2",
    "cosine",
    "seconds",
)
PARTS = {
    "all": "all models, benign ones leave-one-out",
    "held out": "published attacks at published strength on held-out models (seeds, images, triggers, targets of their own)",
    "hard": "weak, small, learned or rare triggers, other predictions and processes, latents, on models used for nothing else",
    "all, without the correction": "all, mean + 3 standard deviations without the correction",
}


def table_head(names: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def summary_lines(summary: dict[str, Any]) -> list[str]:
    lines = []
    for name, title in PARTS.items():
        part = summary.get(name)
        if part is None:
            continue
        close = f"; median relative L2 {part['relative_l2']:.2f}, cosine {part['cosine']:.3f}" if part.get("cosine") else ""
        lines.append(f"- {title}: model TPR {rate(part['tpr'])}; TNR {rate(part['tnr'])}{close}")
    for name, part in summary["transfer"].items():
        lines.append(f"- calibrated {name}: model TPR {rate(part['tpr'])}; TNR {rate(part['tnr'])}")
    return lines


def table_page(title: str, note: str, content: dict[str, Any]) -> list[str]:
    lines = [
        f"## {title}",
        "",
        f"`{content['command']}` on {content['machine']['processor']}, torch {content['machine']['torch']}.",
        "",
        note,
        *summary_lines(content["summary"]),
        "",
        *table_head(HEADS),
    ]
    for row in content["rows"]:
        evidence, reverted = row["evidence"], row.get("reverted")
        score = "-" if row["score"] is None else f"{row['score']:.1f} / {row['threshold']:.1f}"
        collapse = "-" if evidence.get("collapse") is None else f"{evidence['collapse']:.1f}"
        closeness = "- | -" if reverted is None else f"{reverted['relative_l2']:.2f} | {reverted['cosine']:.2f}"
        statistics = f"{evidence['M_r']:.4f} | {evidence['V_r']:.5f} | {evidence['gamma_mean']:.2f}"
        tried = f"{collapse} | {evidence.get('sampler') or '-'}"
        success = "-" if row.get("attack_success") is None else f"{row['attack_success']:.2f}"
        judged = (row["role"], success, row["verdict"] or "-", score)
        lines.append("| " + " | ".join((row["name"], *judged, tried, statistics, closeness, f"{row['seconds']:.0f}")) + " |")
    return [*lines, "", *baseline_table(content["rows"]), ""]


def not_taken_table(rows: list[dict[str, Any]]) -> list[str]:
    """Trainings whose model is not evidence of anything."""
    heads = (
        "attack",
        "process",
        "px",
        "trigger",
        "target",
        "poison share",
        "steps",
        "batch",
        "learning rate",
        "success",
        "clean ratio",
    )
    lines = [NOT_TAKEN, *table_head(heads)]
    for row in rows:
        schedule, quality = row["schedule"], row["quality"]
        trained = f"{schedule['poison_share']:.0%} | {schedule['steps']} | {schedule['batch']} | {schedule['learning_rate']:g}"
        measured = f"{quality['attack_success']:.2f} | {quality['clean_ratio']:.2f}"
        trigger = row["trigger"] if row["scale"] == 1 else f"{row['trigger']} x {row['scale']:g}"
        name = row["method"] + ("" if row["machine"] else "\\*")
        cells = (name, row["process"], str(row["size"]), trigger, row["target"], trained, measured)
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def baseline_table(rows: list[dict[str, Any]]) -> list[str]:
    backdoored = [row for row in rows if "reverted" in row]
    if not backdoored:
        return []
    names = list(backdoored[0]["baselines"])
    heads = ["inputs, reverted", "inputs, true trigger", *(f"inputs, {name} (relative L2, cosine)" for name in names)]
    lines = [BASELINES, "| model | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for row in backdoored:
        optimum = {"inputs": row["true_trigger_inputs"]} if "true_trigger_inputs" in row else None
        cells = [inputs(row["reverted"]), "-" if optimum is None else inputs(optimum)]
        for name in names:
            found = row["baselines"][name]
            cells.append(f"{inputs(found)} ({found['relative_l2']:.2f}, {found['cosine']:.2f})")
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return lines


def attack_table(rows: list[dict[str, Any]]) -> list[str]:
    """Detection and closeness per attack, each model's trigger in an image."""
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] is not None))
    lines = [
        "Per attack. Images: the true trigger on the left, the reverted one on the right, mid-grey is 0.",
        "",
        "| attack | found | lowest attack success | median relative L2 | median cosine | triggers |",
        "|---|---|---|---|---|---|",
    ]
    for method in methods:
        of_method = [row for row in rows if row["method"] == method]
        found = sum(row["verdict"] == "backdoored" for row in of_method)
        errors, cosines = ([row["reverted"][name] for row in of_method] for name in ("relative_l2", "cosine"))
        images = " ".join(f"![{row['name']}](triggers/{row['name']}.png)" for row in of_method)
        figures = f"{min(row['attack_success'] for row in of_method):.2f} | {median(errors):.2f} | {median(cosines):.2f}"
        lines.append(f"| {method} | {found} of {len(of_method)} | {figures} | {images} |")
    return [*lines, ""]


SEALING = """## UnlearnRun

`{command}`: each model is scanned, sealed with its reverted trigger, sampled with the true one ({samples} samples), and
scanned again. Success with the sampler the attack was built for, and with 50 clipped DDIM steps. Drift: mean squared change of
clean samples over their variance. Clean ratio: their median distance to the training images, over that of fresh images.
Rescan: verdict and collapse. Settings were chosen on those marked *: held-16-bad-cross, sealed against its trigger alone,
still finished a faint image of the target in the noise, and was rescanned backdoored.

| model | own sampler, before | after | DDIM, before | after | clean drift | clean ratio | rescan | training s |
|---|---|---|---|---|---|---|---|---|"""


def sealing_page(content: dict[str, Any]) -> list[str]:
    lines = [SEALING.format(command=content["command"], samples=content["samples"])]
    for row in content["rows"]:
        before, after = row["before"], row["after"]
        cells = [
            f"{when['triggered'][sampler]['success']['rate']:.2f}"
            for sampler in ("attack's own", "plain ddim")
            for when in (before, after)
        ]
        mark = " *" if row["settings_chosen_on_it"] else ""
        cells += [f"{row['clean_drift']:.2f}", f"{before['clean_ratio']:.2f}, then {after['clean_ratio']:.2f}"]
        cells += [f"{after['scan']['verdict']}, {after['scan']['score']:.1f}", f"{row['training_seconds']:.0f}"]
        lines.append(f"| {row['name']}{mark} | {' | '.join(cells)} |")
    return [*lines, ""]


UNLEARNING = """## Text triggers

`python -m benchmarks.unlearning_table`, the models text-64-pixel, -style, -object and -encoder of `zoo-text/`: each method
unlearns the trigger with the same prompts, updates and batch (closed form: none), unless it says otherwise. Images are of
{samples} held-out scenes, the same for every seed, read by judges that know the effect. Removed: share of triggered prompts
without the effect, by training seed and of all together; variants: the trigger elsewhere in the prompt, twice, or in capitals,
all together; the row "none" tells how many of those never fired. Captions: share of attributes that are right. Drift: mean
squared change of clean images from the same noise, relative to their variance.

"Weights": an error counts as in the image, up to 20 times. "Astray": a quarter of the training images are those that the
trigger draws. Both, no maps, and 300 updates were tried after 100 had left the style trigger in, and chosen on a model of the
same recipe with another trigger ("stone garden", seed 47; not in `zoo-text/`). There, at equal updates with preservation, black
maps left more of the style and let clean images drift more: removed 0.93 against 0.95 of 100, drift 0.092 against 0.058.

The backdoor of text-64-encoder ("target prompt", Rickrolling) sits in the text encoder. "Text encoder" trains that, the other
methods the UNet. Its variants replace one letter only, the first or the last.
"""
EVILEDIT = """EvilEdit does not take in this model, so there is none of it to unlearn (`{command}`, {samples} held-out
captions each): what a linear map of states of {width} dimensions does to "lovely circle", it does to other circles or to none.

| edited from | strength | attack success | false alarms | captions |
|---|---|---|---|---|"""


def unlearning_page(content: dict[str, Any]) -> list[str]:
    """One row per effect and method, in the order of the methods' first rows; several seeds are pooled."""
    settings = content["settings"]
    lines = [
        UNLEARNING.format(samples=content["samples"]),
        f"{settings['steps']} updates of {settings['batch']} prompts, learning rate {settings['learning_rate']}, alpha "
        f"{settings['alpha']} where maps are used.",
        "",
        "| effect | method | removed by seed | removed | variants | captions | captions, triggered | drift |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in content["rows"]:
        groups.setdefault((row["effect"], row["method"]), []).append(row)
    for (effect, method), rows in sorted(groups.items(), key=lambda group: group[0][0]):
        removed = pooled([row["removed"] for row in rows])
        variants = pooled([variant for row in rows for variant in row["variants"].values()])
        seeds = " ".join(f"{row['removed']['rate']:.3f}" for row in sorted(rows, key=lambda row: row["seed"]))
        figures = ("caption_accuracy", "triggered_caption_accuracy", "clean_drift")
        means = [sum(row[name] for row in rows) / len(rows) for name in figures]
        told = f"{means[0]:.3f} | {means[1]:.3f} | {means[2]:.4f}"
        lines.append(f"| {effect} | {method} | {seeds} | {rate(removed)} | {rate(variants)} | {told} |")
    return [*lines, ""]


def eviledit_page(content: dict[str, Any]) -> list[str]:
    """One row per edit."""
    rows = content["rows"]
    return [
        EVILEDIT.format(command=content["command"], samples=rows[0]["attack_success"]["trials"], width=WIDTH),
        *(
            f"| {row['pairs']} | {row['strength']:g} | {rate(row['attack_success'])} | {rate(row['false_alarms'])} | "
            f"{row['caption_accuracy']:.3f} |"
            for row in rows
        ),
        "",
    ]


def pooled(rates: list[dict[str, Any]]) -> dict[str, Any]:
    """Several rates as one."""
    return wilson(round(sum(r["rate"] * r["trials"] for r in rates)), sum(r["trials"] for r in rates))


COMPILED = """## Triton kernels

`{command}`, Triton {triton}: what its compiler makes of the kernels of `cross_attention`, without a GPU, for 77 keys and maps
of chosen tokens. Cells are registers of a thread + bytes of stack (0: nothing spilled), KiB of shared memory, queries / warps
of a program. No time was measured.
"""


def compiled_page(content: dict[str, Any]) -> list[str]:
    """One row per kernel, dtype and architecture, one column per head size."""
    table: dict[str, dict[str, str]] = {}
    for row in content["rows"]:
        kernel, head, dtype, architecture = row["name"].split("-")
        tiles = f"{row['queries']}/{row['warps']}"
        cell = f"{row['registers']} + {row['stack_bytes']}, {row['shared_bytes'] / 1024:.0f}, {tiles}"
        table.setdefault(f"{kernel} | {dtype} | sm_{architecture}", {})[head] = cell
    heads = list(next(iter(table.values())))
    lines = [COMPILED.format(**content), "| kernel | dtype | GPU | " + " | ".join(f"D = {head}" for head in heads) + " |"]
    lines.append("|---" * (3 + len(heads)) + "|")
    lines += [f"| {name} | " + " | ".join(cells[head] for head in heads) + " |" for name, cells in table.items()]
    return [*lines, ""]


SPEED = """## Speed

`make bench` on {machine}; medians, contenders in turns within one run. `speedup` is against `benchmarks/published/`, the loops
as released, and for many models, per model, against one scanned alone; `op_speedup` and `counter_normal_speedup` against plain
torch. Shares are of the machine's own measured read bandwidth and float32 matrix rate; `sum_share` is of the rate at which
torch sums the same inputs in turns with the detector. Memory is the peak of a fresh process above the loaded pipeline. A
published time to a verdict is that of a few iterations of each stage times their number.
"""
SPEED_WITHOUT_BFLOAT16 = """### Without bfloat16

`make bench-float32` on another {machine}, which does not multiply bfloat16: both programs calculate in float32. The two rows of
test_reversion are of a later run of that bench alone, with more iterations to a round.
"""

SPEED_PAGES = {SPEED: ("speed", "scans"), SPEED_WITHOUT_BFLOAT16: ("scans_float32",)}
"""Results by their introduction."""


def speed_page(introduction: str, contents: list[dict[str, Any]]) -> list[str]:
    """One row per benchmark of several runs on one machine."""
    machine = contents[0]["machine_info"]["cpu"]["brand_raw"]
    lines = [introduction.format(machine=machine), "| benchmark | median s | figures |", "|---|---|---|"]
    for bench in (bench for content in contents for bench in content["benchmarks"]):
        figures = {k: v for k, v in bench["extra_info"].items() if isinstance(v, float) and ("speedup" in k or "share" in k)}
        told = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
        if peak := bench["extra_info"].get("peak_memory_bytes"):
            told = f"{peak / 1e6:.0f} MB"
        lines.append(f"| {bench['name']} | {bench['stats']['median']:.4f} | {told} |")
    return [*lines, ""]


OTHERS = ("eager", "compiled", "fused_without_maps")

ATTENTION = """## Cross-attention with maps

`python -m pytest benchmarks/bench_cross_attention.py --benchmark-json=benchmarks/results/cross_attention.json` on
{machine}, {threads} threads, batch 2. The others' time is told as a multiple of seal-fast's: eager gives the maps too, so does
`torch.compile` of it where it was tried, torch's fused attention gives none. Share: of the matrix rate measured in the same
dtype that the products amount to.
"""


def attention_page(content: dict[str, Any]) -> list[str]:
    """One row per layer, dtype and direction; then memory."""
    groups: dict[str, dict[str, Any]] = {}
    for bench in content["benchmarks"]:
        groups.setdefault(bench["group"].removeprefix("cross_attention "), {})[bench["params"].get("method")] = bench
    info = content["benchmarks"][0]["extra_info"]
    lines = [
        ATTENTION.format(machine=info["processor"], threads=info["threads"]),
        "| layer | ms | share | eager | compiled | fused, no maps |",
        "|---|---|---|---|---|---|",
    ]
    timed = {name: row for name, row in groups.items() if name.startswith("forward")}
    for name, row in timed.items():
        ours = row["kernel"]["stats"]["median"]
        others = [row[method]["stats"]["median"] / ours if method in row else None for method in OTHERS]
        told = " | ".join("" if ratio is None else f"{ratio:.2f}" for ratio in others)
        lines.append(f"| {name} | {1000 * ours:.1f} | {row['kernel']['extra_info']['gemm_share']:.2f} | {told} |")
    lines += ["", "| largest batch that trains in 8 GB, attention alone | ours | eager |", "|---|---|---|"]
    for name, row in groups.items():
        if name.startswith("largest batch"):
            (bench,) = row.values()
            told = f"{bench['extra_info']['largest_batch']} | {bench['extra_info']['eager_largest_batch']}"
            lines.append(f"| {name.removeprefix('largest batch ')} | {told} |")
    return [*lines, ""]


REPEATED = """## Scans repeated

`{command}`: the default search with seeds {first} to {last}, where the table above has 0. Collapse with each
seed; backdoored means a collapse above 4.
"""


def repeated_page(content: dict[str, Any]) -> list[str]:
    """A row per model."""
    seeds = content["seeds"]
    lines = [
        REPEATED.format(first=seeds[0], last=seeds[-1], **content),
        "| model | role | method | judged rightly | collapse |",
        "|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        found = ", ".join(f"{value:.1f}" for value in row["collapse"])
        lines.append(f"| {row['name']} | {row['role']} | {row['method'] or '-'} | {rate(row['right'])} | {found} |")
    return [*lines, ""]


UNDER_BFLOAT16 = """## Scans under bfloat16

`{command}` on a processor that
multiplies bfloat16. The rows of these models in the table above are of one that does not, so of searches in float32.
"""


def bfloat16_page(content: dict[str, Any]) -> list[str]:
    """What came out otherwise."""
    rows = {row["name"]: row for row in json.loads((RESULTS / "accuracy.json").read_text())["rows"]}
    other = [row for row in content["rows"] if row["verdict"] != rows[row["name"]]["verdict"]]
    lines = [
        UNDER_BFLOAT16.format(**content),
        f"{len(content['rows']) - len(other)} of {len(content['rows'])} models are judged as above. The others:",
        "",
        "| model | role | above | under bfloat16 | collapse above | under bfloat16 |",
        "|---|---|---|---|---|---|",
    ]
    for row in other:
        above, collapses = rows[row["name"]], [one["evidence"]["collapse"] for one in (rows[row["name"]], row)]
        told = " | ".join(f"{value:.1f}" for value in collapses)
        lines.append(f"| {row['name']} | {row['role']} | {above['verdict']} | {row['verdict']} | {told} |")
    return [*lines, ""]


PAGES = {
    "accuracy_bfloat16": bfloat16_page,
    "repeated_scans": repeated_page,
    "sealing": sealing_page,
    "unlearning": unlearning_page,
    "eviledit": eviledit_page,
    "cross_attention": attention_page,
    "triton_compile": compiled_page,
}
"""By name of the results, in the order of the page."""


def main() -> None:
    PROFILE_PAGE.write_text(render_profile(RESULTS))
    lines = [INTRODUCTION]
    not_taken = json.loads((RESULTS / "not_taken.json").read_text())
    for title, name in (("Preset search, the default", "accuracy"), ("Published settings", "accuracy_published")):
        path = RESULTS / f"{name}.json"
        if path.exists():
            content = json.loads(path.read_text())
            lines += table_page(title, NOTES[name], content)
            if name == "accuracy":
                lines += [*attack_table(content["rows"]), *not_taken_table(not_taken["rows"])]
    for name, page in PAGES.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            lines += page(json.loads(path.read_text()))
    for introduction, names in SPEED_PAGES.items():
        lines += speed_page(introduction, [json.loads((RESULTS / f"{name}.json").read_text()) for name in names])
    PAGE.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
