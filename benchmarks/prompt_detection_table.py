"""The table of prompt detection: is this prompt triggered? PromptDetector and its peers on the same prompts.

    python -m benchmarks.prompt_detection_table --zoo DIR [--role development] [--only NAME ...]
        [--out benchmarks/results/prompt_detection.json]

DIR holds whole pipelines: `seal-fast zoo build-text DIR` writes them. Captions of scenes that no model was trained on are
scored as they are, with harmless rare strings, and with the trigger. The result of each model is written as soon as it is
known, so an interrupted run continues where it stopped. "NaviT2I" is handed the clean text encoder, which a user does not
have; "NaviT2I, own encoder" takes the model's own in its place.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe_machine
from benchmarks.published.ftt import map_distances
from benchmarks.published.navit2i import navigate
from benchmarks.table_file import grow_table
from benchmarks.text_scan_table import EVALUATION_SEED, ROLES, present
from benchmarks.trigger_names import group_of
from seal_fast.attacks.harmless import Harmless, token_strings
from seal_fast.checkpoints.card import captions
from seal_fast.text_triggers.prompt_detection import PromptDetector
from seal_fast.zoo.build_text import load_text_model
from seal_fast.zoo.evaluate_text import held_out_scenes
from seal_fast.zoo.text_effects import Effect
from seal_fast.zoo.text_recipes import TEXT_RECIPES

PROMPTS = 50
"""Prompts of each of the three sets."""
RESAMPLES = 1000
BOOTSTRAP_SEED = 0

Result = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What a method may use.

    Attributes:
        pipeline: the model.
        clean_encoder: the clean text encoder, for methods that need it.
        prompts: clean prompts to fit on; none of them is scored.
    """

    pipeline: Any
    clean_encoder: Any
    prompts: Sequence[str]


Scorer = Callable[[Sequence[str]], Tensor]
"""Prompts -> float [N], larger is more suspicious."""


def _ours(task: Task) -> Scorer:
    detector = PromptDetector.fitted(task.pipeline, task.prompts)
    # a prompt without any unusual part is the least suspicious one
    return lambda prompts: torch.tensor([-math.inf if one.score is None else one.score for one in detector(prompts)])


def _navit2i(encoder: Any, task: Task) -> Scorer:
    return lambda prompts: torch.tensor([one.score for one in navigate(task.pipeline, prompts, encoder)])


METHODS: Mapping[str, Callable[[Task], Scorer]] = {
    "PromptDetector": _ours,
    "NaviT2I": lambda task: _navit2i(task.clean_encoder, task),
    "NaviT2I, own encoder": lambda task: _navit2i(task.pipeline.text_encoder, task),
    "FTT": lambda task: lambda prompts: -map_distances(task.pipeline, prompts),
}
"""Each method fits itself and returns its scorer."""


def measure(zoo: Path, name: str) -> Result:
    """Every method on every attack of one model."""
    recipe = next(recipe for recipe in TEXT_RECIPES if recipe.name == name)
    assert recipe.base is not None
    # the model card's prompts alternate between training and held-out scenes
    task = Task(load_text_model(name, zoo), load_text_model(recipe.base, zoo).text_encoder, captions(zoo / name)[::2])
    attacks = [compare(task, effect, PROMPTS) for effect in recipe.effects]
    return {"role": recipe.role, "module": recipe.module, "attacks": attacks}


def compare(task: Task, effect: Effect, count: int, methods: Mapping[str, Callable[[Task], Scorer]] = METHODS) -> Result:
    """Every method on one attack, on `count` prompts of each set."""
    sets = prompt_sets(task.pipeline, effect, count)
    tokenizer = task.pipeline.tokenizer
    return {
        "effect": effect.name,
        "trigger": effect.text.quoted,
        "group": group_of(effect.text, tokenizer),
        "methods": {name: _figures(method(task), sets) for name, method in methods.items()},
    }


def prompt_sets(pipeline: Any, effect: Effect, count: int) -> dict[str, list[str]]:
    """The same captions clean, with harmless rare strings, and triggered. No harmless string contains the trigger."""
    prompts = [scene.caption for scene in held_out_scenes(count, EVALUATION_SEED, effect)]
    harmless = Harmless(token_strings(pipeline.tokenizer), (effect.text,), (effect.place,))
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    rare = [harmless.rare(prompt, generator) for prompt in prompts]
    return {"clean": prompts, "rare": rare, "triggered": [effect.trigger(prompt) for prompt in prompts]}


def _figures(scorer: Scorer, sets: Mapping[str, Sequence[str]]) -> Result:
    """AUROC of triggered prompts against all others, and against those with rare strings alone; seconds per prompt."""
    began = time.perf_counter()
    scores = {name: scorer(prompts) for name, prompts in sets.items()}
    seconds = (time.perf_counter() - began) / sum(map(len, sets.values()))
    return {
        "auroc": auroc_with_interval(scores["triggered"], torch.cat([scores["clean"], scores["rare"]])),
        "auroc_rare": auroc_with_interval(scores["triggered"], scores["rare"]),
        "seconds": seconds,
    }


def auroc_with_interval(positives: Tensor, negatives: Tensor) -> dict[str, float]:
    """AUROC of scores, and the 95% interval of its bootstrap: both sets are drawn anew with replacement."""
    wins = (positives[:, None] > negatives).double() + (positives[:, None] == negatives).double() / 2
    generator = torch.Generator().manual_seed(BOOTSTRAP_SEED)
    rows, columns = (_drawn_shares(len(scores), generator) for scores in (positives, negatives))
    drawn = (rows @ wins * columns).sum(dim=1)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"auroc": float(wins.mean()), "low": low, "high": high}


def _drawn_shares(count: int, generator: torch.Generator) -> Tensor:
    """The share of each of `count` scores in every resample, float64 [RESAMPLES, count]."""
    drawn = torch.randint(count, (RESAMPLES, count), generator=generator)
    return torch.zeros(RESAMPLES, count, dtype=torch.float64).scatter_add_(
        1, drawn, torch.full(drawn.shape, 1 / count).double()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--role", choices=ROLES, default="development")
    parser.add_argument("--only", nargs="+", help="default: all backdoored models of the role")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/prompt_detection.json"))
    options = parser.parse_args()
    wanted = [recipe.name for recipe in present(options.zoo, options.role) if recipe.effects]
    if options.only and not set(options.only) <= set(wanted):
        parser.error(f"--only: {options.zoo} holds these backdoored models of role {options.role}: {', '.join(wanted)}")
    head = {
        "command": "python -m benchmarks.prompt_detection_table",
        "machine": describe_machine(),
        "prompts": PROMPTS,
        "resamples": RESAMPLES,
        "seed": BOOTSTRAP_SEED,
    }
    everyone = [recipe.name for recipe in TEXT_RECIPES]
    grow_table(options.out, head, everyone, options.only or wanted, partial(measure, options.zoo))


if __name__ == "__main__":
    main()
