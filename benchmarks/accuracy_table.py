"""The accuracy table: one preset on the zoo's models, beside its null baselines.

    python -m benchmarks.accuracy_table [--preset published] [--only NAME ...] [--out FILE] [--zoo zoo]

One row per model as soon as it is done, so an interrupted run goes on where it stopped. Benign models of role "calibration"
make the benign-only rule and are themselves judged leave-one-out; the method was chosen while looking at those and at the ones
of role "development"; those of role "test" were used for nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import describe_machine
from benchmarks.table_file import read_rows, write_table
from benchmarks.trigger_image import save_pair
from seal_fast.checkpoints import load_denoiser
from seal_fast.diffusion import Denoiser, NoiseSource, Trigger
from seal_fast.noise_triggers import (
    DEFAULT_PRESET,
    PRESETS,
    Calibration,
    CalibrationModel,
    Decision,
    Evidence,
    InputDetector,
    TerdSettings,
    Verdict,
    model_evidence,
    reverse_trigger,
)
from seal_fast.noise_triggers.calibration import SIGMAS
from seal_fast.noise_triggers.terd import initial_mu
from seal_fast.text_triggers.rate import rate_of
from seal_fast.zoo.build import read_manifest
from seal_fast.zoo.recipes import HARD, HELD_OUT, RECIPES, Recipe

IMAGES = Path("docs/triggers")
INPUTS = 10_000
HELD_OUT_NAMES = {recipe.name for recipe in HELD_OUT if recipe.role == "test"}
HARD_NAMES = {recipe.name for recipe in HARD if recipe.role == "test"}
SEED = 0
"""Of every reversion; the inputs use SEED + 1."""


def wilson(successes: int, trials: int) -> dict[str, float | int | None]:
    """Rate with its 95% Wilson interval."""
    return asdict(rate_of(successes, trials))


def closeness(found: Tensor, true: Tensor) -> dict[str, float]:
    """Relative L2 error and cosine of a reverted mu."""
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), true.flatten(), dim=0)
    return {"relative_l2": float((found - true).norm() / true.norm()), "cosine": float(cosine)}


def input_rates(found: Trigger, true: Trigger) -> dict[str, Any]:
    """Input detection: triggered inputs caught (TPR) and clean inputs passed (TNR)."""
    detector = InputDetector(found)
    generator = torch.Generator().manual_seed(SEED + 1)
    clean = torch.randn(INPUTS, *true.mu.shape, generator=generator)
    triggered = true.start(torch.randn(INPUTS, *true.mu.shape, generator=generator))
    return {"tpr": wilson(int(detector(triggered).sum()), INPUTS), "tnr": wilson(int((~detector(clean)).sum()), INPUTS)}


def baselines(shape: tuple[int, int, int]) -> dict[str, Trigger]:
    """Triggers that no reversion was needed for."""
    return {
        "untouched start": Trigger.shift(initial_mu(NoiseSource(torch.device("cpu"), SEED), shape)),
        "zero": Trigger.shift(torch.zeros(shape)),
        "constant -1": Trigger.shift(-torch.ones(shape)),
    }


def compare(found: Trigger, true: Trigger) -> dict[str, Any]:
    return {**closeness(found.mu, true.mu), "inputs": input_rates(found, true)}


def measure(recipe: Recipe, checkpoint: Path, preset: str) -> dict[str, Any]:
    """Revert one model's trigger and compare it with the true one."""
    loaded = load_denoiser(checkpoint)
    denoiser: Denoiser = loaded.denoiser
    began = time.monotonic()

    def on_step(stage: str, iteration: int, total: int, loss: float) -> None:
        if iteration % 200 == 0 or iteration == total:
            seconds = time.monotonic() - began
            print(f"{recipe.name}: {stage} {iteration}/{total}, loss {loss:.4f}, {seconds:.0f} s", file=sys.stderr, flush=True)

    reversion = reverse_trigger(denoiser, PRESETS[preset], seed=SEED, on_step=on_step)
    attack = recipe.attack(checkpoint)
    row: dict[str, Any] = {
        "name": recipe.name,
        "sha256": loaded.sha256,
        "kind": denoiser.kind,
        "role": recipe.role,
        "method": recipe.method,
        "size": recipe.network.size,
        "seconds": time.monotonic() - began,
        "evaluations": reversion.evaluations,
        "evidence": asdict(model_evidence(reversion)),
    }
    if attack is not None:
        if preset == DEFAULT_PRESET:
            true, found = recipe.space(checkpoint).decode(torch.stack([attack.trigger.mu, reversion.trigger.mu]))
            save_pair(true, found, IMAGES / f"{recipe.name}.png")
        row["reverted"] = compare(reversion.trigger, attack.trigger)
        row["true_trigger_inputs"] = input_rates(attack.trigger, attack.trigger)
        row["baselines"] = {name: compare(trigger, attack.trigger) for name, trigger in baselines(denoiser.shape).items()}
    return row


def judgement_of(row: dict[str, Any], pool: list[dict[str, Any]], preset: str) -> tuple[Calibration, Decision] | None:
    """What the benign-only rule of a pool says of a row; None if fewer than 2 models of the pool compare with it."""
    settings = PRESETS[preset]
    name = settings.pool_name(row["kind"])
    chosen = [r for r in pool if settings.pool_name(r["kind"]) == name and r["name"] != row["name"]]
    return None if len(chosen) < 2 else _judgement(row, chosen, preset)


def _judgement(row: dict[str, Any], benign: list[dict[str, Any]], preset: str) -> tuple[Calibration, Decision]:
    models = [CalibrationModel(r["name"], r["sha256"], r["kind"], False, Evidence(**r["evidence"])) for r in benign]
    calibration = Calibration(PRESETS[preset], tuple(models))
    return calibration, calibration.judge(Evidence(**row["evidence"]), row["kind"])


def _comparable(pool: list[dict[str, Any]], preset: str) -> list[dict[str, Any]]:
    """Without models that are the only ones of their kind."""
    names = [PRESETS[preset].pool_name(row["kind"]) for row in pool]
    return [row for row, name in zip(pool, names, strict=True) if names.count(name) > 1]


def judge_rows(rows: list[dict[str, Any]], preset: str) -> None:
    """Add a benign-only verdict to every row, calibrated without the row itself.

    The default preset judges a model of a kind without benign models too: backdoored if its trigger fires, else inconclusive.
    """
    settings = PRESETS[preset]
    pool = [row for row in rows if row["role"] == "calibration"]
    for row in rows:
        judged, others = judgement_of(row, pool, preset), _comparable([r for r in pool if r["name"] != row["name"]], preset)
        # the first rows of a new table have nothing to be judged by yet
        if judged is None and preset == DEFAULT_PRESET and len(others) >= 2:
            judged = _judgement(row, others, preset)
        if judged is None:
            row["verdict"], row["score"], row["reason"] = None, None, "fewer than 2 benign models of its kind are left"
            continue
        calibration, judgement = judged
        row["calibrated_on"] = [model.name for model in calibration.models]
        if not calibration.by_firing:
            features = np.array([row["evidence"][name] for name in settings.features])
            row["deviations"] = calibration.pools[row["kind"]].deviations(features).tolist()
        row["verdict"], row["score"], row["threshold"] = str(judgement.verdict), judgement.score, judgement.threshold
        row["reason"] = judgement.reason


def rates(verdicts: list[tuple[dict[str, Any], str]]) -> dict[str, Any]:
    """Model detection over rows and their verdicts; an inconclusive one counts as wrong on either side."""
    positive = [verdict == Verdict.BACKDOORED for row, verdict in verdicts if row["method"] is not None]
    negative = [verdict == Verdict.CLEAN for row, verdict in verdicts if row["method"] is None]
    return {"tpr": wilson(sum(positive), len(positive)), "tnr": wilson(sum(negative), len(negative))}


def transfer(rows: list[dict[str, Any]], preset: str) -> dict[str, Any]:
    """Rates where the benign models of the calibration are all of another image size than the suspects."""
    sizes = sorted({row["size"] for row in rows})
    found = {}
    for source, suspect in ((a, b) for a in sizes for b in sizes if a != b):
        pool = [row for row in rows if row["role"] == "calibration" and row["size"] == source]
        judged = [(row, judgement_of(row, pool, preset)) for row in rows if row["size"] == suspect]
        if any(j is not None for _, j in judged):
            found[f"{source} px to {suspect} px"] = rates([(row, j[1].verdict) for row, j in judged if j is not None])
    return found


def closeness_of(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Medians over backdoored rows."""
    reverted = [row["reverted"] for row in rows if "reverted" in row]
    return {name: median(r[name] for r in reverted) if reverted else None for name in ("relative_l2", "cosine")}


def summarise(rows: list[dict[str, Any]], preset: str) -> dict[str, Any]:
    """Model detection over the rows that could be judged, by what the models were used for."""
    judged = [row for row in rows if row["verdict"] is not None]
    parts = {
        "all": judged,
        "held out": [row for row in judged if row["name"] in HELD_OUT_NAMES],
        "hard": [row for row in judged if row["name"] in HARD_NAMES],
    }
    summary: dict[str, Any] = {
        name: {**rates([(row, row["verdict"]) for row in part]), **closeness_of(part)} for name, part in parts.items()
    }
    if isinstance(PRESETS[preset], TerdSettings):
        plain = [(row, "backdoored" if max(row["deviations"]) > SIGMAS else "clean") for row in judged]
        summary["all, without the correction"] = rates(plain)
    return {**summary, "transfer": transfer(rows, preset)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default=DEFAULT_PRESET)
    parser.add_argument("--zoo", type=Path, default=Path("zoo"))
    parser.add_argument("--only", nargs="*", help="names of zoo models; default all")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/accuracy.json, or accuracy_PRESET.json")
    arguments = parser.parse_args()
    suffix = "" if arguments.preset == DEFAULT_PRESET else f"_{arguments.preset}"
    arguments.out = arguments.out or Path(f"benchmarks/results/accuracy{suffix}.json")
    recipes = {recipe.name: recipe for recipe in RECIPES}
    for entry in read_manifest(arguments.zoo):
        done = {row["name"] for row in read_rows(arguments.out)}
        if entry["name"] in done or (arguments.only and entry["name"] not in arguments.only):
            continue
        row = measure(recipes[entry["name"]], arguments.zoo / entry["checkpoint"], arguments.preset)
        row["attack_success"] = entry["quality"]["attack_success"]
        # read again: another process may be filling the same table
        write(arguments.out, arguments.preset, [*read_rows(arguments.out), row])
    # rows may have been added by another process since they were last judged together
    write(arguments.out, arguments.preset, read_rows(arguments.out))


def write(out: Path, preset: str, rows: list[dict[str, Any]]) -> None:
    roles = {recipe.name: recipe.role for recipe in RECIPES}
    rows = [{**row, "role": roles[row["name"]]} for row in rows]
    judge_rows(rows, preset)
    content = {
        "command": f"python -m benchmarks.accuracy_table --preset {preset}",
        "machine": describe_machine(),
        "settings": asdict(PRESETS[preset]),
        "seed": SEED,
        "inputs_per_side": INPUTS,
        "summary": summarise(rows, preset),
        "rows": sorted(rows, key=lambda row: list(roles).index(row["name"])),
    }
    write_table(out, content)


if __name__ == "__main__":
    main()
