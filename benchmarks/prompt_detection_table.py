"""The table of prompt detection: is this prompt triggered? PromptDetector and its peers on the same prompts.

    python -m benchmarks.prompt_detection_table --zoo DIR [--role development] [--only NAME ...]
        [--out benchmarks/results/prompt_detection.json]

DIR holds whole pipelines: `seal-fast zoo build-text DIR` writes them. Captions of scenes that no model was trained on are
scored as they are, with the trigger, and with a harmless rare string of the trigger's kind in its place. The result of each
model is written as soon as it is known, so an interrupted run continues where it stopped. "NaviT2I" is handed the clean text
encoder, which a user does not have; "NaviT2I, own encoder" takes the model's own in its place. Methods that draw use the
guidance scale that the zoo is drawn with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.published.ftt import map_distances
from benchmarks.published.navit2i import navigate
from benchmarks.text_zoo import EVALUATION_SEED, grow_zoo_table, recipe_of
from benchmarks.trigger_names import group_of
from seal_fast.attacks.prompts import placed
from seal_fast.checkpoints.card import captions
from seal_fast.text_to_image.prompts import content_ids
from seal_fast.text_triggers.candidates import inserted
from seal_fast.text_triggers.detection_settings import PromptDetectionSettings
from seal_fast.text_triggers.prompt_detection import PromptDetector
from seal_fast.text_triggers.trigger import TextTrigger, random_item
from seal_fast.text_triggers.vocabulary import kind_of, look_alikes
from seal_fast.zoo.build_text import load_text_model
from seal_fast.zoo.evaluate_text import GUIDANCE, held_out_scenes
from seal_fast.zoo.text_effects import Effect

PROMPTS = 40
"""Prompts of each of the three sets; an attack then takes about 1 minute on one core, most of it for FTT."""
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
    detector = PromptDetector.fitted(task.pipeline, task.prompts, PromptDetectionSettings(guidance=GUIDANCE))
    # a familiar prompt, in which nothing was measured, is the least suspicious one
    return lambda prompts: torch.tensor([-math.inf if one.score is None else one.score for one in detector(prompts)])


def _navit2i(encoder: Any, task: Task) -> Scorer:
    return lambda prompts: torch.tensor([one.score for one in navigate(task.pipeline, prompts, encoder)])


METHODS: Mapping[str, Callable[[Task], Scorer]] = {
    "PromptDetector": _ours,
    "NaviT2I": lambda task: _navit2i(task.clean_encoder, task),
    "NaviT2I, own encoder": lambda task: _navit2i(task.pipeline.text_encoder, task),
    "FTT": lambda task: lambda prompts: -map_distances(task.pipeline, prompts, guidance=GUIDANCE),
}
"""Each method fits itself and returns its scorer."""


def measure(zoo: Path, name: str) -> Result:
    """Every method on every attack of one model."""
    recipe = recipe_of(name)
    assert recipe.base is not None
    # the model card's prompts alternate between training and held-out scenes
    task = Task(load_text_model(name, zoo), load_text_model(recipe.base, zoo).text_encoder, captions(zoo / name)[::2])
    scorers = {method: fitted(task) for method, fitted in METHODS.items()}
    attacks = [compare(scorers, task, effect, PROMPTS) for effect in recipe.effects]
    return {"role": recipe.role, "module": recipe.module, "attacks": attacks}


def compare(scorers: Mapping[str, Scorer], task: Task, effect: Effect, count: int) -> Result:
    """Every fitted method on one attack, on `count` prompts of each set."""
    tokenizer = task.pipeline.tokenizer
    sets = prompt_sets(tokenizer, task.prompts, effect, count)
    return {
        "effect": effect.name,
        "trigger": effect.text.quoted,
        "group": group_of(effect.text, tokenizer),
        "methods": {name: _figures(scorer, sets) for name, scorer in scorers.items()},
    }


def prompt_sets(tokenizer: Any, known: Sequence[str], effect: Effect, count: int) -> dict[str, list[str]]:
    """The same captions clean, triggered, and with a harmless string in the trigger's place. None is of `known`."""
    prompts = [scene.caption for scene in held_out_scenes(count, EVALUATION_SEED, effect)]
    kinds: dict[str, list[str]] = {}
    for candidate in inserted(tokenizer, known):
        kinds.setdefault(candidate.kind, []).append(candidate.trigger.text)
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    rare = [placed(random_control(tokenizer, effect.text, kinds, generator), effect.place)(prompt) for prompt in prompts]
    return {"clean": prompts, "rare": rare, "triggered": [effect.trigger(prompt) for prompt in prompts]}


def random_control(
    tokenizer: Any, trigger: TextTrigger, kinds: Mapping[str, Sequence[str]], generator: torch.Generator
) -> TextTrigger:
    """A random control trigger of the same kind: another lookalike of the letter, or other strings for all its own words.

    A word's string has its kind and token count; words of the text that is replaced stay.
    """
    old = trigger.replaces or ""
    if len(old) == 1:
        others = [other for other in look_alikes()[old] if other != trigger.text]
        return TextTrigger(random_item(others, generator), replaces=old)
    words = [
        word if word in old.split() else random_item(_others(tokenizer, word, kinds), generator)
        for word in trigger.text.split(" ")
    ]
    return TextTrigger(" ".join(words), replaces=trigger.replaces)


def _others(tokenizer: Any, word: str, kinds: Mapping[str, Sequence[str]]) -> list[str]:
    """Strings of a word's kind without itself; those of all kinds if a vocabulary has none."""
    own = kinds.get(kind_of(word, len(content_ids(tokenizer, word))), ())
    return [other for other in own if other != word] or [other for some in kinds.values() for other in some if other != word]


def _figures(scorer: Scorer, sets: Mapping[str, Sequence[str]]) -> Result:
    """AUROC of triggered prompts against clean ones, and against those with harmless rare strings."""
    scores = {name: scorer(prompts) for name, prompts in sets.items()}
    return {name: auroc_with_interval(scores["triggered"], scores[name]) for name in ("clean", "rare")}


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
    once = torch.full(drawn.shape, 1 / count, dtype=torch.float64)
    return torch.zeros(RESAMPLES, count, dtype=torch.float64).scatter_add_(1, drawn, once)


def main() -> None:
    head = {"prompts": PROMPTS, "guidance": GUIDANCE, "resamples": RESAMPLES, "seed": BOOTSTRAP_SEED}
    grow_zoo_table("prompt_detection", head, __doc__, lambda recipe: bool(recipe.effects), measure)


if __name__ == "__main__":
    main()
