"""Clean prompts with a harmless rare string: what a prompt detector is fitted on, beside clean prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from seal_fast.text_triggers.candidates import inserted
from seal_fast.text_triggers.trigger import Position, TextTrigger, random_item
from seal_fast.text_triggers.vocabulary import look_alikes

Item = TypeVar("Item")

LONGEST_STRING = 3
"""Words of an inserted string at most."""
REPLACED = 4
"""In one of so many prompts a look-alike replaces a letter; in the others a string is inserted."""
PLACES: tuple[Position, ...] = ("start", "word", "end")


def with_harmless_string(tokenizer: Any, prompts: Sequence[str], known: Sequence[str], seed: int) -> list[str]:
    """Each of the prompts with a random string: up to 3 words or characters at a random place, or a look-alike of a letter.

    Strings are those that a search for triggers tries, each kind as often as another, but for the words of `known`. A poisoned
    model's trigger may be among them; medians bear that.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds: dict[str, list[str]] = defaultdict(list)
    for candidate in inserted(tokenizer, known):
        kinds[candidate.kind].append(candidate.trigger.text)
    pool = list(kinds.values())
    return [
        _with_look_alike(prompt, generator) if number % REPLACED == 0 else _with_string(prompt, pool, generator)
        for number, prompt in enumerate(prompts)
    ]


def _with_string(prompt: str, pool: Sequence[Sequence[str]], generator: torch.Generator) -> str:
    count = 1 + random_item(range(LONGEST_STRING), generator)
    string = TextTrigger(" ".join(_one(_one(pool, generator), generator) for _ in range(count)))
    return string.insert(prompt, string.places(prompt, _one(PLACES, generator), generator)[0])


def _with_look_alike(prompt: str, generator: torch.Generator) -> str:
    letters = [letter for letter in look_alikes() if letter in prompt]
    if not letters:
        return prompt
    letter = _one(letters, generator)
    return prompt.replace(letter, _one(look_alikes()[letter], generator))


def _one(items: Sequence[Item], generator: torch.Generator) -> Item:
    return items[random_item(range(len(items)), generator)]
