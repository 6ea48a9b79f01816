"""Variants of a trigger that are measured: other places and other spellings, each beside its control triggers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from seal_fast.text_triggers.control_triggers import control_triggers
from seal_fast.text_triggers.pairs import prompt_pair
from seal_fast.text_triggers.trigger import PLACES, Position, TextTrigger

AS_GIVEN = "as given"
"""Name of the trigger itself among its variants."""
VARIANT_DIVISOR = 4
"""Every other variant is measured on this many times fewer prompts, because they are most of all images."""
CONTROLS = 3
"""Control triggers that `seal_fast.text_triggers.effect_detectors.ChangeDetector` is fitted on."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts that one variant of a trigger is measured on.

    Attributes:
        trigger: the trigger as given.
        variant: name of the variant.
        clean: N prompts without the trigger.
        triggered: the same prompts with the variant.
        controls: for each control trigger, the same prompts with it in the variant's place.
    """

    trigger: TextTrigger
    variant: str
    clean: tuple[str, ...]
    triggered: tuple[str, ...]
    controls: tuple[tuple[str, ...], ...]


def variants(trigger: TextTrigger, position: Position) -> dict[str, tuple[TextTrigger, Position]]:
    """The variants of a trigger by name, AS_GIVEN first: places where it may stand, and spellings that users may type."""
    places: tuple[Position, ...] = ("start", "word", "end")
    if trigger.replaces is not None:
        only: dict[Position, str] = {"start": "the first only", "word": "one of them", "end": "the last only"}
        return {AS_GIVEN: (trigger, "all"), **{only[place]: (trigger, place) for place in places}}
    found: dict[str, tuple[TextTrigger, Position]] = {AS_GIVEN: (trigger, position)}
    found |= {PLACES[place]: (trigger, place) for place in places if place != position}
    text = trigger.text
    spellings = {"twice": f"{text} {text}", "with a comma": f"{text},"}
    if text.swapcase() != text:
        spellings["other case"] = text.swapcase()
    words = text.split()
    part = " ".join(words[: (len(words) + 1) // 2]) if len(words) > 1 else text[: (len(text) + 1) // 2]
    if part.strip() and part != text:
        spellings["first half"] = part
    return found | {name: (TextTrigger(spelling), position) for name, spelling in spellings.items()}


def prompt_sets(
    tokenizer: Any, trigger: TextTrigger, prompts: Sequence[str], count: int, position: Position, seed: int
) -> list[PromptSet]:
    """`count` prompts for the trigger as given, then fewer for each variant that has room in its prompts.

    Raises:
        ValueError: the trigger fits fewer than two prompts, the tokenizer drops it, or a prompt has no room for it or for two
            control triggers.
    """
    chosen = trigger.fitting(prompts)[:count]
    if len(chosen) < 2:
        raise ValueError(f"at least two held-out prompts are needed for the trigger {trigger.name!r}: give more")
    found = []
    for name, (variant, place) in variants(trigger, position).items():
        clean = chosen if name == AS_GIVEN else chosen[: max(2, len(chosen) // VARIANT_DIVISOR)]
        try:
            triggered = _triggered(tokenizer, clean, variant, place, seed)
            controls = _controls(tokenizer, clean, variant, place, seed)
        except ValueError:
            if name == AS_GIVEN:
                raise
            # a longer variant may not fit
            continue
        found.append(PromptSet(trigger, name, tuple(clean), triggered, controls))
    return found


def _triggered(tokenizer: Any, prompts: Sequence[str], trigger: TextTrigger, position: Position, seed: int) -> tuple[str, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(prompt_pair(tokenizer, prompt, trigger, position, generator).triggered for prompt in prompts)


def _controls(
    tokenizer: Any, prompts: Sequence[str], trigger: TextTrigger, position: Position, seed: int
) -> tuple[tuple[str, ...], ...]:
    """The prompts with each of the first CONTROLS control triggers that fit; some have more tokens than the trigger."""
    found: list[tuple[str, ...]] = []
    for control in control_triggers(tokenizer, trigger):
        try:
            found.append(_triggered(tokenizer, prompts, control, position, seed))
        except ValueError:
            continue
        if len(found) == CONTROLS:
            break
    if len(found) < 2:
        raise ValueError(f"no room for control text in the place of the trigger {trigger.name!r}: give shorter prompts")
    return tuple(found)
