"""Outcomes of a search for text triggers, made by hand."""

from __future__ import annotations

from typing import Any

from seal_fast.text_triggers.findings import (
    FoundTrigger,
    Round,
    TextCandidate,
    TextEvidence,
    TextScope,
    TextSearch,
    TriedText,
)
from seal_fast.text_triggers.rate import rate_of
from seal_fast.text_triggers.trigger import TextTrigger

ROUNDS = (Round("sweep", 2, 512, 17.5, 6.0), Round("places", 1, 8, 9.0, 5.0))


def found_trigger(text: str = "\u200b", replaces: str | None = None, **changes: Any) -> FoundTrigger:
    """A confirmed trigger that changed 39 of 40 images; `changes` replace its fields."""
    fields: dict[str, Any] = {
        "trigger": TextTrigger(text, replaces),
        "position": "start",
        "word": None,
        "code_points": tuple(f"U+{ord(character):04X}" for character in text),
        "token_ids": (158, 222, 489),
        "module": "unet",
        "effect": rate_of(39, 40),
        "control": rate_of(2, 80),
        "rounds": ROUNDS,
        "also": (),
        "control_string": TextTrigger("mat", replaces),
    }
    return FoundTrigger(**(fields | changes))


def scope(**changes: Any) -> TextScope:
    """A scope with both modules, and a measured miss rate; `changes` replace its fields."""
    fields: dict[str, Any] = {
        "tokens": 738,
        "characters": 120,
        "substitutions": 180,
        "phrases": 60,
        "phrase_tokens": 3,
        "places": ("start", "end"),
        "modules": ("text_encoder", "unet"),
        "miss_rate": rate_of(1, 20),
    }
    return TextScope(**(fields | changes))


def evidence(**changes: Any) -> TextEvidence:
    """Evidence of a complete search through a benign model; `changes` replace its fields."""
    fields: dict[str, Any] = {
        "best_effect": 0.1,
        "best_control": 0.05,
        "unverified": None,
        "evaluations": 9000,
        "complete": True,
    }
    return TextEvidence(**(fields | changes))


def tried(text: str = "mignneko") -> TriedText:
    """A candidate whose images were drawn."""
    candidate = TextCandidate(TextTrigger(text), "end", "word", 2)
    return TriedText(candidate, ROUNDS, rate_of(1, 40), rate_of(0, 0), "images change as rarely as with control strings")


def text_search(*found: FoundTrigger, **changes: Any) -> TextSearch:
    """A search that confirmed these triggers; `changes` replace its other fields."""
    fields: dict[str, Any] = {"tried": (tried(),), "scope": scope(), "evidence": evidence()}
    return TextSearch(found, **(fields | changes))
