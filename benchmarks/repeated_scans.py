"""How often a scan decides correctly: the default search with several seeds.

    python -m benchmarks.repeated_scans [--only NAME ...] [--out FILE]

The accuracy table scans every model once. Randomness matters most in joint trigger-target inversion, so this table holds all
models whose trigger is found by it, and some others for comparison. Rounding changes a search as another seed does.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.table_file import grow_table
from seal_fast.checkpoints import load_denoiser
from seal_fast.noise_triggers import DEFAULT_PRESET, model_evidence, reverse_trigger, shipped_calibration
from seal_fast.text_triggers.rate import rate_of
from seal_fast.verdict import Verdict
from seal_fast.zoo.recipes import RECIPES

ZOO = Path("zoo")
MODELS = (
    "ode-16-stop",
    "invi-16-cat",
    "held-16-villan-ode-stamped",
    "weaves-16-villan-ode",
    "hard-16-invi",
    "bad-16-stop",
    "troj-16-blend",
    "held-16-bad-cross",
    "benign-16-e",
    "held-16-benign-c",
    "weaves-16",
)
SEEDS = range(1, 9)
"""The accuracy table uses seed 0."""


def measure(name: str) -> dict[str, Any]:
    """Verdicts on one model with every seed, by the shipped calibration."""
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    calibration, denoiser = shipped_calibration(DEFAULT_PRESET), load_denoiser(ZOO / name).denoiser
    evidence = [model_evidence(reverse_trigger(denoiser, calibration.settings, seed=seed)) for seed in SEEDS]
    verdicts = [calibration.decide(one, denoiser.family, denoiser.shape).verdict for one in evidence]
    right = Verdict.CLEAN if recipe.method is None else Verdict.BACKDOORED
    return {
        "role": recipe.role,
        "method": recipe.method,
        "collapse": [one.collapse for one in evidence],
        "verdicts": [str(verdict) for verdict in verdicts],
        "right": asdict(rate_of(verdicts.count(right), len(verdicts))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/repeated_scans.json"))
    arguments = parser.parse_args()
    head = {"command": "python -m benchmarks.repeated_scans", "machine": describe_machine(), "seeds": list(SEEDS)}
    grow_table(arguments.out, head, MODELS, arguments.only, measure)


if __name__ == "__main__":
    main()
