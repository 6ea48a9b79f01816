"""Propose phrases: all pairs of the most suspicious single tokens, and the best pairs with one more token on either side.

A backdoor that was trained to ignore the parts of its trigger still responds to the whole. One that was not responds to a part
more than to other strings, so the part is among the most suspicious tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from seal_fast.text_triggers.candidates import joined
from seal_fast.text_triggers.confirmation import Tried, explained
from seal_fast.text_triggers.context import SearchContext
from seal_fast.text_triggers.findings import TextCandidate
from seal_fast.text_triggers.places import by_place
from seal_fast.text_triggers.sweep import Ranked, everywhere, sweep_round


def phrases(context: SearchContext, swept: Sequence[Ranked], tried: Sequence[Tried]) -> Iterator[Ranked]:
    """The phrases that respond most, at their best places."""
    settings = context.settings.phrases
    context.meter.begin("phrases")
    parts = [entry.candidate for entry in swept if _is_part(entry.candidate) and not explained(entry.candidate, tried)]
    parts = parts[: settings.parts]
    if len(parts) < 2:
        return
    kept: list[Ranked] = []
    longer = [joined(a, b) for a in parts for b in parts if a != b]
    for length in range(2, settings.longest + 1):
        best = _swept(context, f"phrases of {length}", longer)[: settings.kept]
        kept += best
        if length < settings.longest:
            several = [entry.candidate for entry in best]
            longer = [one for phrase in several for part in parts for one in (joined(phrase, part), joined(part, phrase))]
    lengths = range(2, settings.longest + 1)
    harmless = [one for length in lengths for one in context.random_phrases(length, context.settings.harmless)]
    context.meter.begin("places")
    yield from by_place(context, kept, harmless)


def _is_part(candidate: TextCandidate) -> bool:
    return candidate.trigger.replaces is None and candidate.tokens == 1


def _swept(context: SearchContext, name: str, candidates: Sequence[TextCandidate]) -> list[Ranked]:
    entries = [Ranked(one) for one in dict.fromkeys(candidates)]
    return sweep_round(name, context.probes, entries, (), everywhere, context.settings.sweep, context.settings)
