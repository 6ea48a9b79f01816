"""Propose single strings: tokens, characters and replaced letters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from seal_fast.text_triggers.confirmation import Tried
from seal_fast.text_triggers.context import SearchContext
from seal_fast.text_triggers.encoder_sweep import encoder_round
from seal_fast.text_triggers.places import by_place
from seal_fast.text_triggers.ranking import best
from seal_fast.text_triggers.sweep import Ranked, everywhere, kind_and_place, sweep_round


def sweep_pool(context: SearchContext) -> list[Ranked]:
    """Every string of the pool by its deviation, the largest first. One evaluation tries all places of a string in a prompt."""
    context.meter.begin("sweep")
    pool = [Ranked(one) for one in context.pool]
    return sweep_round("sweep", context.probes, pool, (), everywhere, context.settings.sweep, context.settings)


def single_strings(context: SearchContext, swept: Sequence[Ranked], tried: Sequence[Tried]) -> Iterator[Ranked]:
    """The strings that respond most within their kind, and those that move the text encoder most, at their best places."""
    settings = context.settings
    kinds = [kind_and_place(entry.candidate) for entry in swept]
    deviations = [entry.last.deviation for entry in swept]
    kept = encoder_round(context, swept)
    known = {entry.candidate for entry in kept}
    others = (swept[index] for index in best(deviations, kinds, settings.kept, settings.kept_per_kind))
    kept += [entry for entry in others if entry.candidate not in known]
    context.meter.begin("places")
    harmless = context.harmless([entry.candidate for entry in kept])
    yield from by_place(context, kept, harmless)
