"""The forms of a trigger that are drawn: as given, elsewhere, written otherwise, and harmless text in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from seal_fast.text_triggers.control_triggers import control_triggers
from seal_fast.text_triggers.pairs import prompt_pair
from seal_fast.text_triggers.trigger import Position, TextTrigger

AS_GIVEN = "as given"
VARIANT_SHARE = 4
"""Of so many prompts one is drawn with each variant of a trigger: they are most of all images."""
CONTROLS = 3
"""Harmless triggers that `seal_fast.text_triggers.effect_detectors.ChangeDetector` is fitted on."""


@dataclass(frozen=True)
class Case:
    """One form of a trigger in some prompts: without, with it, and with each harmless trigger in its place."""

    trigger: TextTrigger
    variant: str
    clean: tuple[str, ...]
    triggered: tuple[str, ...]
    harmless: tuple[tuple[str, ...], ...]


def variants(trigger: TextTrigger, position: Position) -> dict[str, tuple[TextTrigger, Position]]:
    """The forms of a trigger that an attacker's user may type: where it stands and how it is written."""
    places: tuple[Position, ...] = ("start", "word", "end")
    if trigger.replaces is not None:
        only: dict[Position, str] = {"start": "the first only", "word": "one of them", "end": "the last only"}
        return {AS_GIVEN: (trigger, "all"), **{only[place]: (trigger, place) for place in places}}
    forms: dict[str, tuple[TextTrigger, Position]] = {AS_GIVEN: (trigger, position)}
    named = {"start": "at the start", "word": "in the middle", "end": "at the end"}
    forms |= {named[place]: (trigger, place) for place in places if place != position}
    text = trigger.text
    changed = {"twice": f"{text} {text}", "with a comma": f"{text},"}
    if text.swapcase() != text:
        changed["other case"] = text.swapcase()
    words = text.split()
    part = " ".join(words[: (len(words) + 1) // 2]) if len(words) > 1 else text[: (len(text) + 1) // 2]
    if part.strip() and part != text:
        changed["first half"] = part
    forms |= {name: (TextTrigger(form), position) for name, form in changed.items()}
    return forms


def cases(
    tokenizer: Any, trigger: TextTrigger, prompts: Sequence[str], count: int, position: Position, seed: int
) -> list[Case]:
    """A trigger as given in `count` prompts, then its variants.

    Raises:
        ValueError: the trigger fits fewer than two prompts, the tokenizer does not see it, or a prompt has no room for it or
            for harmless text in its place.
    """
    chosen = trigger.fitting(prompts)[:count]
    if len(chosen) < 2:
        raise ValueError(f"at least two held-out prompts are needed for the trigger {trigger.name!r}: give more")
    found = []
    for variant, (form, place) in variants(trigger, position).items():
        clean = chosen if variant == AS_GIVEN else chosen[: max(2, len(chosen) // VARIANT_SHARE)]
        try:
            triggered = _triggered(tokenizer, clean, form, place, seed)
            found.append(Case(trigger, variant, tuple(clean), triggered, _harmless(tokenizer, clean, form, place, seed)))
        except ValueError:
            # there may be no room for a longer form
            if variant == AS_GIVEN:
                raise
    return found


def _triggered(tokenizer: Any, prompts: Sequence[str], form: TextTrigger, position: Position, seed: int) -> tuple[str, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(prompt_pair(tokenizer, prompt, form, position, generator).triggered for prompt in prompts)


def _harmless(
    tokenizer: Any, prompts: Sequence[str], form: TextTrigger, position: Position, seed: int
) -> tuple[tuple[str, ...], ...]:
    """The prompts with each of the first CONTROLS harmless triggers that have room: some have more tokens than the trigger."""
    found: list[tuple[str, ...]] = []
    for harmless in control_triggers(tokenizer, form):
        try:
            found.append(_triggered(tokenizer, prompts, harmless, position, seed))
        except ValueError:
            continue
        if len(found) == CONTROLS:
            break
    if len(found) < 2:
        raise ValueError(f"no room for harmless text in the place of the trigger {form.name!r}: give shorter prompts")
    return tuple(found)
