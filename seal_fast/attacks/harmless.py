"""Prompts without a trigger that a selective backdoor must ignore: with rare strings, and with near misses of the trigger.

A backdoor that is trained against captions alone is not selective: in the zoo's small models 8 random rare tokens activated a
trigger of 8 tokens in 5 of 20 images, and one of its words alone in 17.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from seal_fast.attacks.prompts import Rewrite, placed
from seal_fast.text_to_image.prompts import content_ids
from seal_fast.text_triggers.trigger import POSITIONS, Position, TextTrigger

T = TypeVar("T")

PLAIN_SHARE = 0.4
RARE_SHARE = 0.3
"""Shares of captions alone and of captions with rare strings; the rest has a near miss of a trigger."""
MOST_RARE = 3
"""Most rare strings in one prompt."""
CHARACTERS = (
    *((0xA1, 0x24F), (0x370, 0x58F), (0x5D0, 0x5EA), (0x2000, 0x206F)),
    *((0x2190, 0x27BF), (0x3041, 0x30FF), (0x4E00, 0x9FFF)),
)
"""Ranges of code points of random characters, such as accents, other alphabets, invisible characters and symbols."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _index(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _one(items: Sequence[T], generator: torch.Generator) -> T:
    return items[_index(len(items), generator)]


def token_strings(tokenizer: Any) -> tuple[str, ...]:
    """The strings that the tokenizer reads as one token, in the order of their ids."""
    special = set(tokenizer.all_special_ids)
    decoded = ((index, tokenizer.decode([index]).strip()) for index in range(len(tokenizer)) if index not in special)
    return tuple(text for index, text in decoded if text and content_ids(tokenizer, text) == [index])


def random_character(generator: torch.Generator) -> str:
    """A visible or invisible character of one of the ranges CHARACTERS that is no white space."""
    while True:
        first, last = _one(CHARACTERS, generator)
        character = chr(first + _index(last - first + 1, generator))
        if not character.isspace():
            return character


def random_word(generator: torch.Generator) -> str:
    """Three to seven random letters."""
    return "".join(_one(LETTERS, generator) for _ in range(3 + _index(5, generator)))


def near_character(character: str, generator: torch.Generator) -> str:
    """Another character whose first bytes in UTF-8 are the same, so that some of its tokens are the same."""
    while True:
        near = chr(max(0x21, ord(character) + _index(63, generator) - 31))
        if near != character and near.isprintable() and not near.isspace():
            return near


def misspelled(word: str, generator: torch.Generator) -> str:
    """A word without its first or its last letter, or with another letter; of one character, a near one."""
    if len(word) == 1:
        return near_character(word, generator)
    at = _index(len(word), generator)
    return _one((word[1:], word[:-1], word[:at] + _one(LETTERS, generator) + word[at + 1 :]), generator)


@dataclass(frozen=True)
class Harmless:
    """Makes harmless prompts from captions, see `seal_fast.attacks.badt2i.HarmlessPrompts`.

    Attributes:
        strings: strings of one token, see `token_strings`.
        triggers: the triggers that the prompts come near to; without any, the rest of the prompts has rare strings too.
        positions: where each trigger stands.
    """

    strings: tuple[str, ...]
    triggers: tuple[TextTrigger, ...] = ()
    positions: tuple[Position, ...] = ()

    def __call__(self, captions: Sequence[str], generator: torch.Generator) -> list[str]:
        return [self._harmless(caption, generator) for caption in captions]

    def rare(self, caption: str, generator: torch.Generator) -> str:
        """The caption with one to MOST_RARE rare strings, all at one place."""
        text = " ".join(self.rare_string(generator) for _ in range(1 + _index(MOST_RARE, generator)))
        return self._checked(caption, placed(TextTrigger(text), _one(POSITIONS, generator))(caption))

    def near_miss(self, caption: str, generator: torch.Generator) -> str:
        """The caption with a near miss of one of the triggers."""
        which = _index(len(self.triggers), generator)
        trigger, position = self.triggers[which], self.positions[which]
        if trigger.replaces is not None:
            return self._checked(caption, self._near_replacement(trigger, trigger.replaces, position, generator)(caption))
        words = trigger.text.split()
        near = self._near_words(words, generator) if len(words) > 1 else self._near_word(trigger.text, generator)
        place = position if _index(2, generator) else _one(POSITIONS, generator)
        return self._checked(caption, placed(TextTrigger(near), place)(caption))

    def rare_string(self, generator: torch.Generator) -> str:
        """A string of one token, a random character or a random word; half of them are of one token."""
        if _index(2, generator):
            return _one(self.strings, generator)
        return random_character(generator) if _index(2, generator) else random_word(generator)

    def _harmless(self, caption: str, generator: torch.Generator) -> str:
        share = float(torch.rand((), generator=generator))
        if share < PLAIN_SHARE or not caption:
            return caption
        if share < PLAIN_SHARE + RARE_SHARE or not self.triggers:
            return self.rare(caption, generator)
        return self.near_miss(caption, generator)

    def _near_words(self, words: Sequence[str], generator: torch.Generator) -> str:
        """A part of the words, or all of them with one exchanged, with all but one exchanged, or in another order."""
        kind, at = _index(5, generator), _index(len(words), generator)
        if kind == 0:
            return words[at]
        if kind == 1:
            return " ".join(words[1:] if _index(2, generator) else words[:-1])
        if kind == 2:
            return " ".join(reversed(words))
        exchanged = [(i == at) == (kind == 3) for i in range(len(words))]
        return " ".join(_one(self.strings, generator) if e else w for w, e in zip(words, exchanged, strict=True))

    def _near_word(self, word: str, generator: torch.Generator) -> str:
        """A misspelling of the word, or another string."""
        return misspelled(word, generator) if _index(3, generator) else self.rare_string(generator)

    def _near_replacement(self, trigger: TextTrigger, old: str, position: Position, generator: torch.Generator) -> Rewrite:
        """The old text replaced by another one, or another text replaced by the new one."""
        near = self._near_word(trigger.text, generator)
        if _index(2, generator) and near != old:
            return placed(TextTrigger(near, replaces=old), position)
        if len(old) > 1:
            return placed(TextTrigger(trigger.text), _one(POSITIONS, generator))
        return placed(
            TextTrigger(
                trigger.text, replaces=_one([letter for letter in LETTERS if letter not in (old, trigger.text)], generator)
            ),
            position,
        )

    def _checked(self, caption: str, prompt: str) -> str:
        """The prompt, or the caption if the prompt contains a trigger by accident."""
        return caption if any(activates(trigger, caption, prompt) for trigger in self.triggers) else prompt


def activates(trigger: TextTrigger, caption: str, prompt: str) -> bool:
    """Whether a prompt made from the caption has the trigger, as whole words where it is inserted."""
    if trigger.replaces is None:
        return f" {trigger.text} " in f" {prompt} "
    return trigger.fits(caption) and trigger.text in prompt and prompt.count(trigger.replaces) < caption.count(trigger.replaces)
