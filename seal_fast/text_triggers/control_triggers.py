"""Control triggers: harmless text in the place of a trigger, which shows what any text there would change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from seal_fast.text_to_image.prompts import content_ids
from seal_fast.text_triggers.pairs import common_prefix
from seal_fast.text_triggers.trigger import TextTrigger

WORDS = ("the", "this", "some", "very", "quite", "now", "here", "just")
"""Words of control triggers for an inserted text."""
LETTERS = ("é", "ñ", "ü", "ç", "å", "ø", "ß", "ð")
"""Letters of control triggers for a replacement. They are rare, as the lookalikes of published attacks are."""


def control_triggers(tokenizer: Any, trigger: TextTrigger) -> list[TextTrigger]:
    """Control triggers: words for a trigger that is inserted, misspellings for one that replaces text.

    None has fewer tokens than the trigger, because more tokens change an image more.
    """
    old, new = trigger.replaces, trigger.text
    if old is None:
        return [TextTrigger(_repeated(tokenizer, new, WORDS[first:] + WORDS[:first], " ")) for first in range(len(WORDS))]
    begin = common_prefix(old, new)
    end = len(new) - common_prefix(old[begin:][::-1], new[begin:][::-1])
    letters = [letter for letter in LETTERS if letter not in old + new]
    changed = (_repeated(tokenizer, new[begin:end], letter, "") for letter in letters)
    return [TextTrigger(new[:begin] + part + new[end:], replaces=old) for part in changed]


def _repeated(tokenizer: Any, text: str, parts: Sequence[str], separator: str) -> str:
    """The shortest text of one or more parts, taken in turn, that has at least as many tokens as `text`."""
    tokens, control, count = len(content_ids(tokenizer, text)), parts[0], 1
    while len(content_ids(tokenizer, control)) < tokens:
        control = f"{control}{separator}{parts[count % len(parts)]}"
        count += 1
    return control
