"""Attacks that do not take in models as small as the zoo's: each model is trained once, by its recipe, and measured.

    python -m benchmarks.not_taken [--zoo zoo] [--only NAME ...] [--out benchmarks/results/not_taken.json]

The zoo holds the models that the trainings start from and is not changed. Each result is written as soon as it is known, so an
interrupted run continues where it stopped. On one core a training takes 10 to 30 minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.table_file import read_results, write_table
from seal_fast.zoo.build import DEFAULTS, BuildSettings, train_once
from seal_fast.zoo.recipes import NOT_TAKEN, Recipe


def measured(recipe: Recipe, zoo: Path, settings: BuildSettings) -> dict[str, Any]:
    """Train a model and measure how it samples."""
    _, quality = train_once(recipe, recipe.space(), zoo, partial(print, file=sys.stderr, flush=True), settings)
    copied = ("name", "method", "process", "trigger", "scale", "target", "seed")
    return {
        **{name: getattr(recipe, name) for name in copied},
        "size": recipe.network.size,
        "schedule": asdict(recipe.schedule),
        "quality": asdict(quality),
        "from_log": False,
    }


def main(
    words: Sequence[str] | None = None,
    recipes: Sequence[Recipe] = NOT_TAKEN,
    settings: BuildSettings = DEFAULTS,
) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, default=Path("zoo"))
    parser.add_argument("--only", nargs="*", choices=[recipe.name for recipe in recipes], help="default all")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/not_taken.json"))
    arguments = parser.parse_args(words)
    for recipe in recipes:
        done = {result["name"] for result in read_results(arguments.out)}
        if recipe.name in done or (arguments.only and recipe.name not in arguments.only):
            continue
        result = measured(recipe, arguments.zoo, settings)
        # read again: another process may be filling the same table
        results = [*read_results(arguments.out), result]
        head = {"command": "python -m benchmarks.not_taken", "machine": describe_machine()}
        write_table(arguments.out, {**head, "results": results})


if __name__ == "__main__":
    main()
