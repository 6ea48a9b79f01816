"""How many images each part of the default search saves, and whether it changes the result.

    python -m benchmarks.evaluations [--only NAME ...] [--out FILE]

Every model is searched with the default settings, and again with one part undone at a time. An image counts once, with a
gradient or without.
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
    "no successive halving": replace(DEFAULTS, inversion=replace(INVERSION, halving=((STEPS, INVERSION.halving[-1][1]),))),
    "no pilot samples": replace(DEFAULTS, test=replace(TEST, pilot_samples=TEST.samples - 1)),
    "no previews": replace(DEFAULTS, inversion=replace(INVERSION, preview_steps=TEST.deterministic_steps)),
    "all samples at once": replace(DEFAULTS, test=replace(TEST, samples=TEST.confirming_samples - 1)),
}
DEFAULT, TO_THE_END = "default", "no early stop"
SEED = 0


def search_of(denoiser: Denoiser, settings: SearchSettings) -> dict[str, Any]:
    found = reverse_trigger(denoiser, settings, seed=SEED)
    return {"images": found.evaluations, "collapse": found.collapse}


def search_to_the_end(denoiser: Denoiser) -> dict[str, Any]:
    """The search by all proposers: the last one runs even if a candidate of the others was accepted."""
    probe = Probe(denoiser, SEED, DEFAULTS.half_precision)
    found = [search_trigger(probe, DEFAULTS, proposers).best for proposers in (PROPOSERS[:-1], PROPOSERS[-1:])]
    return {"images": probe.evaluations, "collapse": max(best.score for best in found if best.score is not None)}


def published_images() -> int:
    """Images that TERD's program puts through the denoiser, the same number for every model."""
    return sum(stage.iterations * stage.images for stage in TerdSettings().stages)


def measure(name: str) -> dict[str, Any]:
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    denoiser = load_denoiser(ZOO / name).denoiser
    searches = {DEFAULT: search_of(denoiser, DEFAULTS), TO_THE_END: search_to_the_end(denoiser)}
    searches |= {name: search_of(denoiser, settings) for name, settings in UNDONE.items()}
    return {"role": recipe.role, "backdoored": recipe.method is not None, "searches": searches}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/evaluations.json"))
    arguments = parser.parse_args()
    head = {"command": "python -m benchmarks.evaluations", "machine": describe_machine(), "seed": SEED}
    grow_table(arguments.out, {**head, "published_images": published_images()}, MODELS, arguments.only, measure)


if __name__ == "__main__":
    main()
