"""The parts of a prompt that could be a trigger, each with the prompt that is left without it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise
from typing import Any, Self

from seal_fast.text_to_image.prompts import content_ids
from seal_fast.text_triggers.vocabulary import kind_of, look_alikes

LONGEST_PHRASE = 3
"""Adjacent unusual words that are masked together, besides all of them. Longer triggers show in their parts or as a whole."""
MOST_TOKENS = 6
"""Parts of more tokens compare with those of so many, since long strings are rare."""

_WORD = re.compile(r"[!-/:-@\[-`{-~]+|[^ \t\r\n!-/:-@\[-`{-~]+")
"""ASCII punctuation, or what stands between it and ASCII spaces. An unusual space belongs to a word: it may be a trigger."""
_NON_ASCII = re.compile(r"[^\x00-\x7f]+")


@dataclass(frozen=True)
class PromptPart:
    """A part of a prompt that could be a trigger.

    Attributes:
        text: the part.
        without: the prompt without it.
        kind: what the part compares with. Kinds that begin with the same word are near each other, see `PartNulls`.
    """

    text: str
    without: str
    kind: str


@dataclass(frozen=True)
class Familiar:
    """The words and pairs of adjacent words of clean prompts. They are harmless, since they stand in clean prompts."""

    counts: Counter[str]

    @classmethod
    def of(cls, prompts: Sequence[str]) -> Self:
        return cls(Counter(item for prompt in prompts for item in _words_and_pairs(prompt)))

    def without(self, prompt: str) -> Familiar:
        """What the other prompts hold; `prompt` must be one of them."""
        return Familiar(self.counts - Counter(_words_and_pairs(prompt)))

    def __contains__(self, words: str) -> bool:
        return words.lower() in self.counts

    def core(self, prompt: str) -> str:
        """The familiar words of a prompt, after lookalikes became Latin letters: what is left if all unusual parts go."""
        plain = _NON_ASCII.sub(lambda run: " " if run[0].isspace() else "", prompt.translate(_letters()))
        return _cut(plain, [match.span() for match in _WORD.finditer(plain) if match[0] not in self])


def _words_and_pairs(prompt: str) -> set[str]:
    words = _WORD.findall(prompt.lower())
    return {*words, *map(" ".join, pairwise(words))}


def prompt_parts(tokenizer: Any, prompt: str, familiar: Familiar) -> list[PromptPart]:
    """Every part of a prompt that is not familiar.

    Parts are unusual words and phrases of them, pairs of familiar words that are not familiar as a pair, runs of non-ASCII
    characters, and lookalikes of letters. A part goes from all places of the prompt at once, since a trigger may stand at
    several; a lookalike becomes its Latin letter. Parts that leave the token ids as they are, or the same text as another one,
    are left out.
    """
    ids = content_ids(tokenizer, prompt)
    found: dict[str, PromptPart] = {}
    for part in (*_phrases(tokenizer, prompt, familiar), *_characters(prompt), *_folded(prompt)):
        if part.without not in found and content_ids(tokenizer, part.without) != ids:
            found[part.without] = part
    return list(found.values())


def _phrases(tokenizer: Any, prompt: str, familiar: Familiar) -> Iterator[PromptPart]:
    """Unusual pairs of familiar words, and phrases within each run of unusual words."""
    words = list(_WORD.finditer(prompt))
    for known, group in groupby(words, lambda match: match[0] in familiar):
        run = list(group)
        lengths = {2} if known else {*range(1, LONGEST_PHRASE + 1), len(run)}
        for length in sorted(length for length in lengths if length <= len(run)):
            for start in range(len(run) - length + 1):
                phrase = [match[0] for match in run[start : start + length]]
                if known and " ".join(phrase) in familiar:
                    continue
                text = prompt[run[start].start() : run[start + length - 1].end()]
                kind = "pair of familiar words" if known else _unusual_kind(tokenizer, text)
                yield PromptPart(text, _cut(prompt, _places(words, phrase)), kind)


def _places(words: Sequence[re.Match[str]], phrase: Sequence[str]) -> list[tuple[int, int]]:
    """Spans of all occurrences of a phrase."""
    found, place, texts = [], 0, [match[0] for match in words]
    while place < len(words):
        if texts[place : place + len(phrase)] == list(phrase):
            found.append((words[place].start(), words[place + len(phrase) - 1].end()))
            place += len(phrase)
        else:
            place += 1
    return found


def _cut(prompt: str, spans: Sequence[tuple[int, int]]) -> str:
    """The prompt without the characters of the spans, with single spaces."""
    for start, end in reversed(spans):
        prompt = f"{prompt[:start]} {prompt[end:]}"
    return " ".join(re.split(r"[ \t\r\n]+", prompt)).strip(" ")


def _unusual_kind(tokenizer: Any, text: str) -> str:
    return f"unusual {kind_of(''.join(text.split()), min(MOST_TOKENS, len(content_ids(tokenizer, text))))}"


def _characters(prompt: str) -> Iterator[PromptPart]:
    """Every run of non-ASCII characters; words that an unusual space separates stay separate."""
    for run in dict.fromkeys(_NON_ASCII.findall(prompt)):
        yield PromptPart(run, _cut(prompt.replace(run, " " if run.isspace() else ""), []), "characters")


def _folded(prompt: str) -> Iterator[PromptPart]:
    """Every lookalike as its Latin letter, each one and all at once, as an attack may replace several letters."""
    letters = _letters()
    found = [character for character in dict.fromkeys(prompt) if ord(character) in letters]
    for some in dict.fromkeys([*found, "".join(found)] if found else []):
        yield PromptPart(some, prompt.translate({ord(one): letters[ord(one)] for one in some}), "lookalikes")


@cache
def _letters() -> dict[int, str]:
    """Lookalike -> the Latin letter, for `str.translate`."""
    return {ord(other): letter for letter, others in look_alikes().items() for other in others}
