"""The trigger of a text backdoor: text that is inserted into a prompt, or text that replaces another one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, TypeVar

import torch

from seal_fast.printable import printable

Item = TypeVar("Item")

Position = Literal["start", "end", "word", "all"]
"""Where a trigger stands in a prompt. Inserted text: before the first word, after the last one, or before a random word but the
first ("word"). Text that replaces another one: the first, the last, a random or every ("all") occurrence of it."""

POSITIONS: tuple[Position, ...] = ("start", "end", "word")
"""Where a trigger may be trained. A text that replaces another one is also trained at "all" places."""

PLACES: Mapping[Position, str] = {
    "start": "at the start",
    "word": "in the middle",
    "end": "at the end",
    "all": "everywhere",
}
"""Positions as phrases."""

ARROW = "=>"
"""Separates the two texts of a replacement on the command line."""
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|\\x([0-9a-fA-F]{2})")


@dataclass(frozen=True)
class TextTrigger:
    """Text that activates a backdoor of a text-to-image model.

    Attributes:
        text: what the attacker's user adds to a prompt.
        replaces: the text of the prompt that `text` takes the place of, as a homoglyph does; None if `text` is inserted.

    Raises:
        ValueError: one of the texts is empty or no text.
    """

    text: str
    replaces: str | None = None

    def __post_init__(self) -> None:
        if not self.text or self.replaces == "":
            raise ValueError("the texts of a trigger must not be empty")
        if any("\ud800" <= character <= "\udfff" for character in self.text + (self.replaces or "")):
            raise ValueError(f"the trigger {self.name!r} holds half of a surrogate pair, which is no character")
        if self.text == self.replaces:
            raise ValueError(f"the trigger replaces {self.text!r} by itself: give two different texts")

    @classmethod
    def parse(cls, text: str) -> Self:
        r"""Read a trigger from the command line.

        "OLD=>NEW" replaces OLD by NEW; any other text is inserted. Escapes such as \u200b, \U00010486 and \xa0 stand for one
        character each.

        Raises:
            ValueError: a text is empty, or an escape names no character.
        """
        plain = _ESCAPE.sub(lambda match: chr(int(match[1] or match[2] or match[3], 16)), text)
        old, arrow, new = plain.partition(ARROW)
        return cls(new, replaces=old) if arrow else cls(plain)

    @property
    def name(self) -> str:
        """The trigger in one line for people: its text, or "OLD => NEW"."""
        return self.text if self.replaces is None else f"{self.replaces} => {self.text}"

    @property
    def quoted(self) -> str:
        """The trigger in quotes, which shows spaces at its ends; a character that cannot be printed is escaped."""
        text = f"'{printable(self.text)}'"
        return text if self.replaces is None else f"'{printable(self.replaces)}' => {text}"

    def fits(self, prompt: str) -> bool:
        """Whether the prompt can carry the trigger. Inserted text fits all; a replacement needs the text that it replaces."""
        return self.replaces is None or self.replaces in prompt

    def fitting(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that can carry the trigger.

        Raises:
            ValueError: there is none.
        """
        found = [prompt for prompt in prompts if self.fits(prompt)]
        if not found:
            raise ValueError(f"no prompt contains the text that the trigger {self.name!r} replaces: add prompts that do")
        return found

    def places(self, prompt: str, position: Position, generator: torch.Generator) -> list[int]:
        """Indices of the prompt's characters where the trigger is to be inserted or to replace, in ascending order.

        Raises:
            ValueError: the trigger does not fit the prompt, or position "all" is asked of an inserted text.
        """
        if self.replaces is None:
            return [self._insertion(prompt, position, generator)]
        found = [match.start() for match in re.finditer(re.escape(self.replaces), prompt)]
        if not found:
            raise ValueError(f"the prompt {prompt!r} does not contain {self.replaces!r}, which {self.text!r} replaces")
        if position == "all":
            return found
        return [random_item(found, generator) if position == "word" else found[0 if position == "start" else -1]]

    def _insertion(self, prompt: str, position: Position, generator: torch.Generator) -> int:
        if position == "all":
            raise ValueError(f'position "all" is for a text that replaces another one; {self.text!r} is inserted')
        if position == "end":
            return len(prompt)
        words = [match.start() for match in re.finditer(r"\S+", prompt)]
        return random_item(words[1:] or words, generator) if position == "word" else words[0]

    def insert(self, prompt: str, place: int) -> str:
        """The prompt with the trigger at one of its `places`; a space separates an inserted text from the words beside it."""
        if self.replaces is not None:
            return prompt[:place] + self.text + prompt[place + len(self.replaces) :]
        return f"{prompt[:place]}{self.text} {prompt[place:]}" if place < len(prompt) else f"{prompt} {self.text}"


def as_triggers(triggers: Sequence[TextTrigger | str]) -> tuple[TextTrigger, ...]:
    """Triggers as callers may give them: a plain str is text to insert.

    Raises:
        ValueError: there is none, one is empty, or a single text stands in the place of the list.
    """
    if isinstance(triggers, str | TextTrigger) or not triggers:
        raise ValueError("triggers must be a list with at least one text or TextTrigger")
    return tuple(TextTrigger(trigger) if isinstance(trigger, str) else trigger for trigger in triggers)


def random_item(items: Sequence[Item], generator: torch.Generator) -> Item:
    """One of the items, drawn uniformly."""
    return items[int(torch.randint(len(items), (), generator=generator))]
