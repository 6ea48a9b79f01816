"""Tell places apart: candidates at the start, in the middle and at the end of several prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from seal_fast.text_triggers.context import SearchContext
from seal_fast.text_triggers.findings import TextCandidate
from seal_fast.text_triggers.ranking import best
from seal_fast.text_triggers.sweep import Ranked, at_each_place, in_place, kind_and_place, sweep_round


def by_place(context: SearchContext, kept: Sequence[Ranked], harmless: Sequence[TextCandidate]) -> Iterator[Ranked]:
    """The candidates at those places where they deserve images, the strongest response first.

    Args:
        context: the search.
        kept: candidates whose place does not matter yet.
        harmless: candidates that show what their kinds do.
    """
    settings, verification = context.settings, context.settings.verification
    placed = [Ranked(place, entry.rounds) for entry in kept for place in at_each_place(entry.candidate)]
    known = [place for one in harmless for place in at_each_place(one)]
    entries = sweep_round("places", context.probe, placed, known, in_place, settings.places, settings)
    kinds = [kind_and_place(entry.candidate) for entry in entries]
    left = [entries[index] for index in best([entry.last.deviation for entry in entries], kinds, settings.places)]
    suspicious = [
        entry
        for entry in left
        if entry.last.response >= verification.least_response and entry.last.deviation >= verification.least_deviation
    ]
    context.meter.begin("verification")
    yield from sorted(suspicious, key=lambda entry: -entry.last.response)[: verification.candidates]
