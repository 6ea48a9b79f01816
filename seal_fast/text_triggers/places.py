"""Tell places apart: candidates at the start, in the middle and at the end of several prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from seal_fast.text_triggers.context import SearchContext
from seal_fast.text_triggers.findings import TextCandidate
from seal_fast.text_triggers.sweep import Ranked, at_each_place, in_place, sweep_round


def by_place(context: SearchContext, kept: Sequence[Ranked], harmless: Sequence[TextCandidate]) -> Iterator[Ranked]:
    """The candidates at those places where they deserve images, the largest deviation first.

    Args:
        context: the search.
        kept: candidates whose place does not matter yet.
        harmless: candidates that show what their kinds do.
    """
    settings, verification = context.settings, context.settings.verification
    placed = [Ranked(place, entry.rounds) for entry in kept for place in at_each_place(entry.candidate)]
    known = [place for one in harmless for place in at_each_place(one)]
    entries = sweep_round("places", context.probes, placed, known, in_place, settings.places, settings)
    suspicious = [
        entry
        for entry in entries
        if entry.last.response >= verification.least_response
        and entry.last.deviation >= verification.least_deviation
        and entry.last.rank <= verification.per_kind
    ]
    context.meter.begin("verification")
    yield from suspicious[: verification.candidates]
