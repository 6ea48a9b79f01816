"""What a trigger is compared with: harmless text in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from seal_fast.text_triggers.pairs import common_prefix
from seal_fast.text_triggers.trigger import TextTrigger

WORDS = ("the", "this", "some", "very", "quite", "now", "here", "just")
"""Put between the words of a prompt."""
LETTERS = ("é", "ñ", "ü", "ç", "å", "ø", "ß", "ð")
"""Put in the place of letters: rare, as the look-alikes of published attacks are."""


def control_triggers(tokenizer: Any, trigger: TextTrigger) -> list[TextTrigger]:
    """Words in the place of a trigger that is put in, misspellings in that of one that replaces text.

    None has fewer tokens than the trigger: more tokens change more.
    """
    old, new = trigger.replaces, trigger.text
    if old is None:
        return [TextTrigger(_at_least(tokenizer, new, WORDS[first:] + WORDS[:first], " ")) for first in range(len(WORDS))]
    begin = common_prefix(old, new)
    end = len(new) - common_prefix(old[begin:][::-1], new[begin:][::-1])
    letters = [letter for letter in LETTERS if letter not in old + new]
    changed = (_at_least(tokenizer, new[begin:end], letter, "") for letter in letters)
    return [TextTrigger(new[:begin] + letter + new[end:], replaces=old) for letter in changed]


def _at_least(tokenizer: Any, text: str, parts: Sequence[str], space: str) -> str:
    """As many parts in turn, at least one, as make no fewer tokens than a text."""
    tokens, harmless, count = _length(tokenizer, text), parts[0], 1
    while _length(tokenizer, harmless) < tokens:
        harmless = f"{harmless}{space}{parts[count % len(parts)]}"
        count += 1
    return harmless


def _length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)
