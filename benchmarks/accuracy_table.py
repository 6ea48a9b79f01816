"""The accuracy table: one preset on the zoo's models, beside its null baselines.

    python -m benchmarks.accuracy_table [--preset published] [--only NAME ...] [--out FILE] [--zoo zoo]

Each model's result is written as soon as it is known, so an interrupted run continues where it stopped. The limit comes from
the benign models of role "calibration"; each of those is decided by a calibration without itself. The method was chosen while
looking at models of role "calibration" and "development". Models of role "test" were used for nothing else.
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
from benchmarks.table_file import read_results, write_table
from benchmarks.trigger_image import save_pair
from seal_fast.checkpoints import load_denoiser
from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import Denoiser, ModelFamily, NoiseSource
from seal_fast.noise_triggers import (
    DEFAULT_PRESET,
    PRESETS,
    Calibration,
    CalibrationModel,
    Evidence,
    InputDetector,
    TerdSettings,
    model_evidence,
    reverse_trigger,
)
from seal_fast.noise_triggers.calibration import ModelGroup, by_collapse, group_of
from seal_fast.noise_triggers.terd import initial_mu
from seal_fast.noise_triggers.verdict import LIMIT_SIGMAS
from seal_fast.text_triggers.rate import rate_of
from seal_fast.verdict import Decision, Verdict
from seal_fast.zoo.build import read_manifest
from seal_fast.zoo.recipes import HARD, HELD_OUT, RECIPES, Recipe

IMAGES = Path("docs/triggers")
INPUTS = 10_000
HELD_OUT_NAMES = {recipe.name for recipe in HELD_OUT if recipe.role == "test"}
HARD_NAMES = {recipe.name for recipe in HARD if recipe.role == "test"}
SEED = 0
"""Seed of every reversion; the inputs use SEED + 1."""


def wilson(successes: int, trials: int) -> dict[str, float | int | None]:
    """A rate with its 95% Wilson interval."""
    return asdict(rate_of(successes, trials))


def closeness(found: Tensor, true: Tensor) -> dict[str, float]:
    """Relative L2 error and cosine similarity of a recovered mu."""
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
    """Null baselines: triggers that need no reversion."""
    return {
        "untouched start": Trigger.shift(initial_mu(NoiseSource(torch.device("cpu"), SEED), shape)),
        "zero": Trigger.shift(torch.zeros(shape)),
        "constant -1": Trigger.shift(-torch.ones(shape)),
    }


def compare(found: Trigger, true: Trigger) -> dict[str, Any]:
    return {**closeness(found.mu, true.mu), "inputs": input_rates(found, true)}


def measure(recipe: Recipe, checkpoint: Path, preset: str) -> dict[str, Any]:
    """Recover one model's trigger and compare it with the true one."""
    loaded = load_denoiser(checkpoint)
    denoiser: Denoiser = loaded.denoiser
    began = time.monotonic()

    def on_step(stage: str, iteration: int, total: int, loss: float) -> None:
        if iteration % 200 == 0 or iteration == total:
            seconds = time.monotonic() - began
            print(f"{recipe.name}: {stage} {iteration}/{total}, loss {loss:.4f}, {seconds:.0f} s", file=sys.stderr, flush=True)

    reversion = reverse_trigger(denoiser, PRESETS[preset], seed=SEED, on_step=on_step)
    attack = recipe.attack(checkpoint)
    result: dict[str, Any] = {
        "name": recipe.name,
        "sha256": loaded.sha256,
        "family": asdict(denoiser.family),
        "shape": list(denoiser.shape),
        "role": recipe.role,
        "method": recipe.method,
        "seconds": time.monotonic() - began,
        "evaluations": reversion.evaluations,
        "evidence": asdict(model_evidence(reversion)),
    }
    if attack is not None:
        if preset == DEFAULT_PRESET:
            true, found = recipe.space(checkpoint).decode(torch.stack([attack.trigger.mu, reversion.trigger.mu]))
            save_pair(true, found, IMAGES / f"{recipe.name}.png")
        result["reverted"] = compare(reversion.trigger, attack.trigger)
        result["true_trigger_inputs"] = input_rates(attack.trigger, attack.trigger)
        result["baselines"] = {name: compare(trigger, attack.trigger) for name, trigger in baselines(denoiser.shape).items()}
    return result


def model_of(result: dict[str, Any]) -> CalibrationModel:
    """The model of a result, as a benign one of a calibration."""
    family, shape = ModelFamily(**result["family"]), tuple(result["shape"])
    return CalibrationModel(result["name"], result["sha256"], family, shape, False, Evidence(**result["evidence"]))


def group(result: dict[str, Any], preset: str) -> ModelGroup:
    """The models that the model of a result compares with."""
    model = model_of(result)
    return group_of(PRESETS[preset], model.family, model.shape)


def decision_of(result: dict[str, Any], pool: list[dict[str, Any]], preset: str) -> tuple[Calibration, Decision] | None:
    """The decision on a result by the other models of a benign pool; None if fewer than 2 of them compare with it."""
    chosen = [r for r in pool if group(r, preset) == group(result, preset) and r["name"] != result["name"]]
    return None if len(chosen) < 2 else decided_by(result, chosen, preset)


def decided_by(result: dict[str, Any], benign: list[dict[str, Any]], preset: str) -> tuple[Calibration, Decision]:
    calibration, model = Calibration(PRESETS[preset], tuple(map(model_of, benign))), model_of(result)
    return calibration, calibration.decide(model.evidence, model.family, model.shape)


def comparable(pool: list[dict[str, Any]], preset: str) -> list[dict[str, Any]]:
    """The models of a pool that are not the only ones of their family."""
    groups = [group(result, preset) for result in pool]
    return [result for result, one in zip(pool, groups, strict=True) if groups.count(one) > 1]


def decide(results: list[dict[str, Any]], preset: str) -> None:
    """Add a verdict to every result, by a calibration on benign models that leaves it out.

    The default preset decides on a model whose family has no benign models too, with the limit used without them.
    """
    pool = [result for result in results if result["role"] == "calibration"]
    for result in results:
        decided = decision_of(result, pool, preset)
        others = comparable([r for r in pool if r["name"] != result["name"]], preset)
        # the first results of a new table have no pool yet
        if decided is None and preset == DEFAULT_PRESET and len(others) >= 2:
            decided = decided_by(result, others, preset)
        if decided is None:
            result["verdict"], result["score"] = None, None
            continue
        calibration, decision = decided
        result["calibrated_on"] = [model.name for model in calibration.models]
        if not by_collapse(calibration.settings):
            features = np.array([result["evidence"][name] for name in PRESETS[preset].features])
            result["deviations"] = calibration.pools[group(result, preset)].deviations(features).tolist()
        result["verdict"], result["score"], result["threshold"] = str(decision.verdict), decision.score, decision.threshold


def rates(verdicts: list[tuple[dict[str, Any], str]]) -> dict[str, Any]:
    """Model detection over results and their verdicts. An inconclusive verdict counts as wrong, on benign models too."""
    positive = [verdict == Verdict.BACKDOORED for result, verdict in verdicts if result["method"] is not None]
    negative = [verdict == Verdict.CLEAN for result, verdict in verdicts if result["method"] is None]
    return {"tpr": wilson(sum(positive), len(positive)), "tnr": wilson(sum(negative), len(negative))}


def transfer(results: list[dict[str, Any]], preset: str) -> dict[str, Any]:
    """Rates where all benign models of the calibration have another image size than the models decided on."""
    sizes = sorted({result["shape"][-1] for result in results})
    found = {}
    for source, suspect in ((a, b) for a in sizes for b in sizes if a != b):
        pool = [result for result in results if result["role"] == "calibration" and result["shape"][-1] == source]
        decided = [(result, decision_of(result, pool, preset)) for result in results if result["shape"][-1] == suspect]
        if any(decision is not None for _, decision in decided):
            found[f"{source} px to {suspect} px"] = rates([(result, d[1].verdict) for result, d in decided if d is not None])
    return found


def closeness_of(results: list[dict[str, Any]]) -> dict[str, float | None]:
    """Medians over backdoored models."""
    reverted = [result["reverted"] for result in results if "reverted" in result]
    return {name: median(r[name] for r in reverted) if reverted else None for name in ("relative_l2", "cosine")}


def summarise(results: list[dict[str, Any]], preset: str) -> dict[str, Any]:
    """Model detection over the results with a verdict, by what the models were used for."""
    decided = [result for result in results if result["verdict"] is not None]
    parts = {
        "all": decided,
        "held out": [result for result in decided if result["name"] in HELD_OUT_NAMES],
        "hard": [result for result in decided if result["name"] in HARD_NAMES],
    }
    summary: dict[str, Any] = {
        name: {**rates([(result, result["verdict"]) for result in part]), **closeness_of(part)} for name, part in parts.items()
    }
    if isinstance(PRESETS[preset], TerdSettings):
        plain = [(result, "backdoored" if max(result["deviations"]) > LIMIT_SIGMAS else "clean") for result in decided]
        summary["all, without the correction"] = rates(plain)
    return {**summary, "transfer": transfer(results, preset)}


def write(out: Path, preset: str, results: list[dict[str, Any]]) -> None:
    roles = {recipe.name: recipe.role for recipe in RECIPES}
    results = [{**result, "role": roles[result["name"]]} for result in results]
    decide(results, preset)
    content = {
        "command": "python -m benchmarks.accuracy_table" + ("" if preset == DEFAULT_PRESET else f" --preset {preset}"),
        "machine": describe_machine(),
        "settings": asdict(PRESETS[preset]),
        "seed": SEED,
        "inputs_per_side": INPUTS,
        "summary": summarise(results, preset),
        "results": sorted(results, key=lambda result: list(roles).index(result["name"])),
    }
    write_table(out, content)


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
        done = {result["name"] for result in read_results(arguments.out)}
        if entry["name"] in done or (arguments.only and entry["name"] not in arguments.only):
            continue
        result = measure(recipes[entry["name"]], arguments.zoo / entry["checkpoint"], arguments.preset)
        result["attack_success"] = entry["quality"]["attack_success"]
        # read again: another process may be filling the same table
        write(arguments.out, arguments.preset, [*read_results(arguments.out), result])
    # another process may have added results since the last common decision
    write(arguments.out, arguments.preset, read_results(arguments.out))


if __name__ == "__main__":
    main()
