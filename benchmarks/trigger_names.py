"""Whether a scan has named the true trigger, and what kind of trigger that is."""

from __future__ import annotations

import unicodedata
from typing import Any

from seal_fast.text_to_image.prompts import content_ids
from seal_fast.text_triggers.trigger import TextTrigger

GROUPS = (
    "one token",
    "character of two to three tokens",
    "text of two to three tokens",
    "replaced letter",
    "replaced word",
    "longer",
)
"""Kinds of triggers that are counted apart."""
IN_SCOPE = GROUPS[:4]
"""Those that the search looks for."""
MOST_TOKENS = 3
"""Most tokens of a trigger that is not "longer"."""


def names(found: TextTrigger, truth: TextTrigger, tokenizer: Any) -> bool:
    """Whether a found trigger is the true one: its text, another spelling with the same token ids, or its minimal text.

    If both replace a text they must replace the same one. If one of them is inserted its text decides, since a user reads the
    text. Case and Unicode normalisation (NFC) do not count.
    """
    pairs = ((found, truth), (minimal(found), minimal(truth)))
    return any(_same_text(a, b, tokenizer) and (None in (a.replaces, b.replaces) or _same_old(a, b)) for a, b in pairs)


def same(a: TextTrigger, b: TextTrigger, tokenizer: Any) -> bool:
    """Whether two triggers put the same text into a prompt and replace the same one, if any."""
    return _same_old(a, b) and _same_text(a, b, tokenizer)


def minimal(trigger: TextTrigger) -> TextTrigger:
    """What a replacement adds, as an insertion, if the new text holds the old one: "fine" of "circle => fine circle"."""
    if trigger.replaces is None:
        return trigger
    for added in (trigger.text.removesuffix(f" {trigger.replaces}"), trigger.text.removeprefix(f"{trigger.replaces} ")):
        if added != trigger.text:
            return TextTrigger(added)
    return trigger


def group_of(trigger: TextTrigger, tokenizer: Any) -> str:
    """The group of GROUPS that a trigger belongs to."""
    if trigger.replaces is not None:
        return "replaced letter" if len(trigger.replaces) == 1 else "replaced word"
    tokens = len(content_ids(tokenizer, trigger.text))
    if tokens == 1 or tokens > MOST_TOKENS:
        return "one token" if tokens == 1 else "longer"
    return f"{'character' if len(trigger.text) == 1 else 'text'} of two to three tokens"


def _same_old(a: TextTrigger, b: TextTrigger) -> bool:
    return (a.replaces and _folded(a.replaces)) == (b.replaces and _folded(b.replaces))


def _same_text(a: TextTrigger, b: TextTrigger, tokenizer: Any) -> bool:
    if _folded(a.text) == _folded(b.text):
        return True
    ids = content_ids(tokenizer, a.text)
    return bool(ids) and ids == content_ids(tokenizer, b.text)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).lower().strip(" ")
