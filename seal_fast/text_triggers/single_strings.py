"""Propose single strings: tokens, characters, replaced letters and swapped words, by successive halving."""

from __future__ import annotations

from collections.abc import Iterator

from seal_fast.text_triggers.context import SearchContext
from seal_fast.text_triggers.encoder_sweep import encoder_round
from seal_fast.text_triggers.sweep import Ranked, at_each_place, everywhere, in_place, sweep_round


def single_strings(context: SearchContext) -> Iterator[Ranked]:
    """The strings of the pool that both rounds keep, the best first."""
    settings, probe = context.settings, context.probe
    first, second = settings.rounds
    pool = [Ranked(one) for one in context.pool]
    context.meter.begin("sweep")
    kept = sweep_round("sweep", probe, pool, (), everywhere, first, settings)
    kept += [entry for entry in encoder_round(context, pool) if entry.candidate not in {one.candidate for one in kept}]
    context.meter.begin("places")
    harmless = [place for one in context.harmless([entry.candidate for entry in kept]) for place in at_each_place(one)]
    placed = [Ranked(place, entry.rounds) for entry in kept for place in at_each_place(entry.candidate)]
    entries = sweep_round("places", probe, placed, harmless, in_place, second, settings)
    context.meter.begin("verification")
    yield from entries[: settings.verification.candidates]
