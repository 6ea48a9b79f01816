"""Measure the models of the text-to-image zoo one by one, as the tables of scans and of prompt detection do."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.table_file import grow_table
from seal_fast.zoo.text_recipes import TEXT_RECIPES, TextRecipe

ROLES = ("development", "test")
EVALUATION_SEED = 900
"""Seed of the prompts and images that a method is compared on; no recipe uses it."""

Measure = Callable[[Path, str], dict[str, Any]]
"""The zoo's folder and the name of a model -> its result."""


def recipe_of(name: str) -> TextRecipe:
    return next(recipe for recipe in TEXT_RECIPES if recipe.name == name)


def present(zoo: Path, role: str) -> list[TextRecipe]:
    """The recipes of a role whose pipeline the folder holds."""
    return [one for one in TEXT_RECIPES if one.role == role and (zoo / one.name / "model_index.json").is_file()]


def grow_zoo_table(
    name: str, head: dict[str, Any], description: str | None, wanted: Callable[[TextRecipe], bool], measure: Measure
) -> None:
    """Run the command of a table: measure what its file lacks of the wanted models of one role.

    Args:
        name: the module is benchmarks.NAME_table, the file benchmarks/results/NAME.json.
        head: facts that hold for all results.
        description: for --help.
        wanted: the models that the table has.
        measure: measures one of them.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--role", choices=ROLES, default="development")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="default: all models of the role")
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/{name}.json"))
    options = parser.parse_args()
    names = [recipe.name for recipe in present(options.zoo, options.role) if wanted(recipe)]
    if not names or not set(options.only or ()) <= set(names):
        parser.error(f"{options.zoo} holds these models of role {options.role}: {', '.join(names) or 'none'}")
    facts = {"command": f"python -m benchmarks.{name}_table", "machine": describe_machine(), **head}
    everyone = [recipe.name for recipe in TEXT_RECIPES]
    grow_table(options.out, facts, everyone, options.only or names, partial(measure, options.zoo))
