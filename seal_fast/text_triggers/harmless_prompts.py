"""Clean prompts with a harmless rare string: what a prompt detector is fitted on, beside clean prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from seal_fast.text_triggers.candidates import inserted
from seal_fast.text_triggers.trigger import POSITIONS, TextTrigger, random_item
from seal_fast.text_triggers.vocabulary import look_alikes

LONGEST_STRING = 3
"""Words of an inserted string at most."""
REPLACED = 4
"""In one of so many prompts a lookalike replaces a letter; in the others a string is inserted."""


def with_harmless_string(tokenizer: Any, prompts: Sequence[str], known: Sequence[str], seed: int) -> list[str]:
    """Each of the prompts with a random string: up to 3 words or characters at a random place, or a lookalike of a letter.

    Strings are those that a search for triggers tries, each kind as often as another, but for the words of `known`. A poisoned
    model's trigger may be among them; medians bear that.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds: dict[str, list[str]] = defaultdict(list)
    for candidate in inserted(tokenizer, known):
        kinds[candidate.kind].append(candidate.trigger.text)
    pool = list(kinds.values())
    return [
        _with_lookalike(prompt, generator) if number % REPLACED == 0 else _with_string(prompt, pool, generator)
        for number, prompt in enumerate(prompts)
    ]


def _with_string(prompt: str, pool: Sequence[Sequence[str]], generator: torch.Generator) -> str:
    count = random_item(range(1, LONGEST_STRING + 1), generator)
    string = TextTrigger(" ".join(random_item(random_item(pool, generator), generator) for _ in range(count)))
    return string.insert(prompt, string.places(prompt, random_item(POSITIONS, generator), generator)[0])


def _with_lookalike(prompt: str, generator: torch.Generator) -> str:
    """The prompt with a lookalike at all places of one of its letters; a prompt without Latin letters stays as it is."""
    letters = [letter for letter in look_alikes() if letter in prompt]
    if not letters:
        return prompt
    letter = random_item(letters, generator)
    return prompt.replace(letter, random_item(look_alikes()[letter], generator))
