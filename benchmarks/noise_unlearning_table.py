"""The table of unlearned noise triggers: the zoo's backdoored models before and after unlearning.

    python -m benchmarks.noise_unlearning_table [--only NAME ...] [--samples 128]
        [--out benchmarks/results/noise_unlearning.json]

Each model is scanned, unlearned with its recovered trigger, sampled with the true one, and scanned again. Each model's result
is written as soon as it is known, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy_table import closeness, wilson
from benchmarks.machine import describe_machine
from benchmarks.table_file import read_results, write_table
from seal_fast import scan, unlearn
from seal_fast.attacks import Attack
from seal_fast.checkpoints import load_denoiser
from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import VP, Denoiser, sample
from seal_fast.results.unlearning import NoiseUnlearnReport
from seal_fast.zoo.build import read_manifest
from seal_fast.zoo.evaluate import SAMPLES, SUCCESS_MSE, clean_ratio, draw
from seal_fast.zoo.recipes import RECIPES, Recipe

SEED = 20
DEVELOPMENT = ("bad-16-box", "troj-16-blend", "held-16-bad-cross")
"""Models that the method and its settings were chosen on. The others were unlearned for this table only."""


@torch.no_grad()
def clipped_ddim(denoiser: Denoiser, attack: Attack, count: int) -> Tensor:
    """Triggered samples of a sampler that does not know the trigger: 50 clipped DDIM steps."""
    noise = torch.randn(count, *denoiser.shape, generator=torch.Generator().manual_seed(SEED))
    start = denoiser.process.prior_scale * attack.trigger.start(noise)
    return sample(denoiser, start, "ddim", 50, clip=isinstance(denoiser.process, VP))


def by_attack(denoiser: Denoiser, attack: Attack, count: int) -> Tensor:
    """Triggered samples of the sampler the attack was built for."""
    return draw(denoiser, attack, triggered=True, count=count, seed=SEED)


SAMPLERS: dict[str, Callable[[Denoiser, Attack, int], Tensor]] = {"attack's own": by_attack, "clipped DDIM": clipped_ddim}


def success(denoiser: Denoiser, attack: Attack, count: int, family: str) -> dict[str, Any]:
    """Attack success of each sampler with the true trigger, and how far its samples lie from the family's images."""
    triggered = {}
    for name, draw_triggered in SAMPLERS.items():
        images = draw_triggered(denoiser, attack, count)
        errors = (images - attack.target).square().mean(dim=(1, 2, 3))
        triggered[name] = {
            "success": wilson(int((errors < SUCCESS_MSE).sum()), count),
            "target_mse": float(errors.mean()),
            "ratio_of_triggered_samples": clean_ratio(images.clamp(-1, 1), family),
        }
    clean = draw(denoiser, attack, triggered=False, count=min(count, SAMPLES), seed=SEED)
    return {"triggered": triggered, "clean_ratio": clean_ratio(clean, family)}


def verdict(checkpoint: Path, folder: Path) -> tuple[dict[str, Any], Path | None]:
    """The verdict of a scan with the default preset, and the file of the recovered trigger."""
    result = scan(checkpoint, out=folder).models[0]
    trigger = None if result.trigger is None else folder / result.trigger
    return {"verdict": str(result.verdict), "score": result.score}, trigger


def measure(recipe: Recipe, checkpoint: Path, count: int, work: Path) -> dict[str, Any]:
    """One model's result."""
    attack = recipe.attack(checkpoint)
    if attack is None:
        raise ValueError(f"{recipe.name} has no backdoor")
    say(recipe, "scanning")
    before, trigger = verdict(checkpoint, work / "before")
    if trigger is None:
        raise ValueError(f"{recipe.name}: no trigger was recovered")
    say(recipe, "unlearning")
    report = unlearn(checkpoint, [trigger], work / "unlearned").report
    if not isinstance(report, NoiseUnlearnReport):
        raise TypeError(f"{recipe.name} is no model with noise triggers")
    say(recipe, "scanning again")
    after, _ = verdict(work / "unlearned", work / "after")
    say(recipe, "sampling")
    poisoned, unlearned = (load_denoiser(path).denoiser for path in (checkpoint, work / "unlearned"))
    return {
        "name": recipe.name,
        "method": recipe.method,
        "settings_chosen_on_it": recipe.name in DEVELOPMENT,
        "reverted_trigger": closeness(Trigger.load(trigger).mu, attack.trigger.mu),
        "before": {**success(poisoned, attack, count, recipe.family), "scan": before},
        "after": {**success(unlearned, attack, count, recipe.family), "scan": after},
        "clean_drift": report.clean_drift,
        "effects": [asdict(effect) for effect in report.effects],
        "steps": report.steps,
        "training_seconds": report.training_seconds,
        "peak_memory_bytes": report.peak_memory_bytes,
    }


def say(recipe: Recipe, what: str) -> None:
    print(f"{recipe.name}: {what}", file=sys.stderr, flush=True)


def write(out: Path, count: int, results: list[dict[str, Any]]) -> None:
    order = [recipe.name for recipe in RECIPES]
    content = {
        "command": f"python -m benchmarks.noise_unlearning_table --samples {count}",
        "machine": describe_machine(),
        "seed": SEED,
        "samples": count,
        "results": sorted(results, key=lambda result: order.index(result["name"])),
    }
    write_table(out, content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, default=Path("zoo"))
    parser.add_argument("--only", nargs="*", help="names of zoo models; default all backdoored ones")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/noise_unlearning.json"))
    arguments = parser.parse_args()
    recipes = {recipe.name: recipe for recipe in RECIPES}
    for entry in read_manifest(arguments.zoo):
        done = {result["name"] for result in read_results(arguments.out)}
        if entry["method"] is None or entry["name"] in done or (arguments.only and entry["name"] not in arguments.only):
            continue
        with tempfile.TemporaryDirectory() as work:
            result = measure(recipes[entry["name"]], arguments.zoo / entry["checkpoint"], arguments.samples, Path(work))
        # read again: another process may be filling the same table
        write(arguments.out, arguments.samples, [*read_results(arguments.out), result])


if __name__ == "__main__":
    main()
