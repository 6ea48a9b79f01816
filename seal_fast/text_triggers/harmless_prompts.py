"""Clean prompts, and clean prompts with a harmless rare string: what a prompt detector is fitted on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from seal_fast.text_triggers.candidates import inserted
from seal_fast.text_triggers.prompt_units import words
from seal_fast.text_triggers.trigger import random_item
from seal_fast.text_triggers.vocabulary import look_alikes

LONGEST_STRING = 3
"""Words of an inserted string at most."""
REPLACED = 4
"""In every so-manieth prompt a look-alike replaces a letter; in the others a string is inserted."""


@dataclass(frozen=True)
class HarmlessPrompt:
    """A prompt that is taken to be harmless.

    Attributes:
        text: the prompt.
        source: the clean prompt that it was made from.
        scored: whether the limit is fitted on it. Otherwise only its own string is measured.
        inserted: the string that alone is measured; "" for all parts.
    """

    text: str
    source: str
    scored: bool
    inserted: str = ""


def harmless_prompts(tokenizer: Any, prompts: Sequence[str], scored: int, strings: int, seed: int) -> list[HarmlessPrompt]:
    """Up to `scored` of the prompts, as many again with a harmless string, and `strings` with another one that alone is measured.

    A string is 1 to 3 members of the pool that a search tries, of random kinds, at a random place, or a look-alike of a letter.
    A poisoned model's trigger may be among them; medians and quantiles bear that.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(prompts), generator=generator).tolist()
    kinds: dict[str, list[str]] = defaultdict(list)
    for candidate in inserted(tokenizer, prompts):
        kinds[candidate.kind].append(candidate.trigger.text)
    pool = list(kinds.values())
    clean = [prompts[index] for index in order[:scored]]
    found = [HarmlessPrompt(prompt, prompt, scored=True) for prompt in clean]
    for number in range(len(clean) + strings):
        # other prompts than the clean ones, as far as there are some
        source = prompts[order[(len(clean) + number) % len(order)]]
        text, string = _with_string(source, pool, number % REPLACED == 0, generator)
        whole = number < len(clean)
        found.append(HarmlessPrompt(text, source, scored=whole, inserted="" if whole else string))
    return found


def _with_string(prompt: str, pool: list[list[str]], replaced: bool, generator: torch.Generator) -> tuple[str, str]:
    """The prompt with a harmless string, and the string."""
    letters = [letter for letter in look_alikes() if letter in prompt]
    if letters and (replaced or not pool):
        letter = letters[random_item(range(len(letters)), generator)]
        others = look_alikes()[letter]
        other = others[random_item(range(len(others)), generator)]
        return prompt.replace(letter, other), other
    everything, count = words(prompt), random_item(range(1, LONGEST_STRING + 1), generator)
    string = " ".join(_member(pool, generator) for _ in range(count))
    place = random_item((0, random_item(range(len(everything) + 1), generator), len(everything)), generator)
    return " ".join([*everything[:place], string, *everything[place:]]), string


def _member(pool: list[list[str]], generator: torch.Generator) -> str:
    kind = pool[random_item(range(len(pool)), generator)]
    return kind[random_item(range(len(kind)), generator)]
