"""What each part of the default search saves, in images put through the denoiser, and whether it changes what is found.

    python -m benchmarks.evaluations [--only NAME ...] [--out FILE]

Every model is searched as it comes, and again with one part at a time undone. An image whose gradient is asked for counts once,
as one without.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.table_file import grow_table
from seal_fast.checkpoints import load_denoiser
from seal_fast.diffusion import Denoiser
from seal_fast.noise_triggers import SearchSettings, TerdSettings, reverse_trigger
from seal_fast.noise_triggers.probe import Probe
from seal_fast.noise_triggers.search import PROPOSERS, search_trigger
from seal_fast.zoo.recipes import RECIPES

ZOO = Path("zoo")
MODELS = (
    "benign-16-e",
    "benign-32-a",
    "bad-16-stop",
    "troj-16-blend",
    "ode-16-stop",
    "held-16-benign-c",
    "held-16-bad-cross",
    "held-16-troj-patch",
    "hard-16-invi",
)
DEFAULTS = SearchSettings()
TEST, INVERSION = DEFAULTS.test, DEFAULTS.inversion
STEPS = sum(iterations for iterations, _ in INVERSION.halving)
UNDONE = {
    "no guess left behind in the race": replace(
        DEFAULTS, inversion=replace(INVERSION, halving=((STEPS, INVERSION.halving[-1][1]),))
    ),
    "no glance at a few samples": replace(DEFAULTS, test=replace(TEST, pilot_samples=TEST.samples - 1)),
    "no sketches": replace(DEFAULTS, inversion=replace(INVERSION, preview_steps=TEST.deterministic_steps)),
    "many noises at once": replace(DEFAULTS, test=replace(TEST, samples=TEST.confirming_samples - 1)),
}
AS_IT_COMES, TO_THE_END = "as it comes", "no stop where a trigger fires"
SEED = 0


def search_of(denoiser: Denoiser, settings: SearchSettings) -> dict[str, Any]:
    found = reverse_trigger(denoiser, settings, seed=SEED)
    return {"images": found.evaluations, "collapse": found.collapse}


def search_to_the_end(denoiser: Denoiser) -> dict[str, Any]:
    """Of the last proposer and of the others, whether or not a candidate of those is accepted."""
    probe = Probe(denoiser, SEED, DEFAULTS.half_precision)
    found = [search_trigger(probe, DEFAULTS, proposers).best for proposers in (PROPOSERS[:-1], PROPOSERS[-1:])]
    return {"images": probe.evaluations, "collapse": max(best.score for best in found if best.score is not None)}


def published_images() -> int:
    """Of TERD's program for one model; its settings are the same for every one."""
    return sum(stage.iterations * stage.images for stage in TerdSettings().stages)


def measure(name: str) -> dict[str, Any]:
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    denoiser = load_denoiser(ZOO / name).denoiser
    ways = {AS_IT_COMES: search_of(denoiser, DEFAULTS), TO_THE_END: search_to_the_end(denoiser)}
    ways |= {name: search_of(denoiser, settings) for name, settings in UNDONE.items()}
    return {"role": recipe.role, "backdoored": recipe.method is not None, "ways": ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/evaluations.json"))
    arguments = parser.parse_args()
    head = {"command": "python -m benchmarks.evaluations", "machine": describe_machine(), "seed": SEED}
    grow_table(arguments.out, {**head, "published_images": published_images()}, MODELS, arguments.only, measure)


if __name__ == "__main__":
    main()
