"""The parts of a prompt that could be a trigger, each with the prompt that is left without it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from seal_fast.text_to_image.prompts import content_ids
from seal_fast.text_triggers.vocabulary import kind_of, look_alikes

LONGEST_KNOWN_PHRASE = 2
"""Adjacent known words that are masked together at most."""
LONGEST_UNKNOWN_PHRASE = 3
"""Adjacent unknown words that are masked together, besides all adjacent ones. Longer triggers show in their parts or as a whole."""
MOST_TOKENS = 6
"""Units of more tokens compare with those of so many, since long strings are rare."""


@dataclass(frozen=True)
class PromptUnit:
    """A part of a prompt that could be a trigger.

    Attributes:
        text: the part.
        without: the prompt without it.
        kind: what the unit compares with. Kinds that begin with the same word are alike.
    """

    text: str
    without: str
    kind: str


def known_words(prompts: Sequence[str]) -> frozenset[str]:
    """The words of clean prompts, in lower case without punctuation at their ends."""
    return frozenset(_plain(word) for prompt in prompts for word in words(prompt))


def words(prompt: str) -> list[str]:
    """The parts of a prompt between ASCII spaces; an unusual space belongs to a word, since it may be a trigger."""
    return [word for word in re.split(r"[ \t\r\n]+", prompt) if word]


def prompt_units(tokenizer: Any, prompt: str, known: frozenset[str]) -> list[PromptUnit]:
    """Every unit of a prompt: words, phrases of known or of unknown words, non-ASCII characters, and look-alikes of letters.

    A unit goes from all places of the prompt at once, since a trigger may stand at several. A look-alike becomes its Latin
    letter. Units that leave the token ids as they are, or leave the same text as another unit, are left out.

    Args:
        tokenizer: the pipeline's.
        prompt: the prompt.
        known: see `known_words`.
    """
    ids = content_ids(tokenizer, prompt)
    found: dict[str, PromptUnit] = {}
    for unit in (*_phrases(tokenizer, prompt, known), *_characters(prompt), *_folded(prompt)):
        if unit.without not in found and content_ids(tokenizer, unit.without) != ids:
            found[unit.without] = unit
    return list(found.values())


def core(prompt: str, known: frozenset[str]) -> str:
    """The known words of a prompt, after look-alikes became Latin letters: what is left if all unusual parts go."""
    letters = _letters()
    folded = prompt.translate({ord(character): letters[character] for character in set(prompt) if character in letters})
    plain = re.sub(r"[^\x00-\x7f]+", lambda run: " " if run[0].isspace() else "", folded)
    return " ".join(word for word in words(plain) if _plain(word) in known)


def _plain(word: str) -> str:
    return word.strip(".,;:!?\"'()").lower()


def _phrases(tokenizer: Any, prompt: str, known: frozenset[str]) -> Iterator[PromptUnit]:
    """Phrases within each run of known and of unknown words."""
    everything = words(prompt)
    for run, familiar in _runs(everything, known):
        longest = LONGEST_KNOWN_PHRASE if familiar else LONGEST_UNKNOWN_PHRASE
        lengths = {*range(1, min(longest, len(run)) + 1), 1 if familiar else len(run)}
        for length in sorted(lengths):
            for first in range(len(run) - length + 1):
                phrase = run[first : first + length]
                kind = f"known {length}" if familiar else _unknown_kind(tokenizer, phrase)
                yield PromptUnit(" ".join(phrase), _without(everything, phrase), kind)


def _runs(everything: list[str], known: frozenset[str]) -> list[tuple[list[str], bool]]:
    """The longest runs of words that are all known, or all unknown."""
    runs: list[tuple[list[str], bool]] = []
    for word in everything:
        familiar = _plain(word) in known
        if not runs or runs[-1][1] != familiar:
            runs.append(([], familiar))
        runs[-1][0].append(word)
    return runs


def _unknown_kind(tokenizer: Any, phrase: Sequence[str]) -> str:
    tokens = min(MOST_TOKENS, sum(len(content_ids(tokenizer, word)) for word in phrase))
    return f"unknown {kind_of(''.join(phrase), tokens)}"


def _without(everything: list[str], phrase: list[str]) -> str:
    """The words without any occurrence of the phrase."""
    left, place = [], 0
    while place < len(everything):
        if everything[place : place + len(phrase)] == phrase:
            place += len(phrase)
        else:
            left.append(everything[place])
            place += 1
    return " ".join(left)


def _characters(prompt: str) -> Iterator[PromptUnit]:
    """Every run of non-ASCII characters; words that an unusual space separates stay separate."""
    for run in dict.fromkeys(re.findall(r"[^\x00-\x7f]+", prompt)):
        yield PromptUnit(run, " ".join(words(prompt.replace(run, " " if run.isspace() else ""))), "characters")


def _folded(prompt: str) -> Iterator[PromptUnit]:
    """Every look-alike as its Latin letter, each one and all at once, as an attack may replace several letters."""
    letters = _letters()
    found = [character for character in dict.fromkeys(prompt) if character in letters]
    for some in dict.fromkeys([*((one,) for one in found), tuple(found)] if found else []):
        folded = prompt.translate({ord(character): letters[character] for character in some})
        yield PromptUnit("".join(some), folded, "look-alikes")


@cache
def _letters() -> dict[str, str]:
    """Look-alike -> the Latin letter."""
    return {other: letter for letter, others in look_alikes().items() for other in others}
