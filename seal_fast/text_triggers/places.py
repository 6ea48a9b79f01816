"""Tell places apart: candidates at the start, in the middle and at the end of several prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from seal_fast.text_triggers.context import SearchContext
from seal_fast.text_triggers.encoder_sweep import ENCODER
from seal_fast.text_triggers.findings import TextCandidate
from seal_fast.text_triggers.search_settings import VerificationSettings
from seal_fast.text_triggers.sweep import Ranked, at_each_place, in_place, sweep_round


def by_place(context: SearchContext, kept: Sequence[Ranked], harmless: Sequence[TextCandidate]) -> Iterator[Ranked]:
    """The candidates at those places where they deserve images, the largest changes of the first images first.

    Args:
        context: the search.
        kept: candidates whose place does not matter yet.
        harmless: candidates that show what their kinds do.
    """
    settings = context.settings
    placed = [Ranked(place, entry.rounds) for entry in kept for place in at_each_place(entry.candidate)]
    known = [place for one in harmless for place in at_each_place(one)]
    entries = sweep_round("places", context.probes, placed, known, in_place, settings.places, settings)
    moving = [entry for entry in entries if _moves_encoder(entry, settings.encoder_limit)]
    suspicious = [entry for entry in entries if entry not in moving and _moves_unet(entry, settings.verification)]
    context.meter.begin("verification")
    most = settings.verification.candidates
    chosen = [*moving[: most // 2], *suspicious][:most]
    context.images.draw([entry.candidate for entry in chosen])
    yield from sorted(chosen, key=lambda entry: context.images.first_changes(entry.candidate), reverse=True)


def _moves_encoder(entry: Ranked, limit: float) -> bool:
    """Whether it moved the text encoder most of its kind, and by far. All of the kind may move the UNet."""
    return any(round.name == ENCODER and round.rank == 1 and round.deviation >= limit for round in entry.rounds)


def _moves_unet(entry: Ranked, settings: VerificationSettings) -> bool:
    last = entry.last
    return (
        last.response >= settings.least_response
        and last.deviation >= settings.least_deviation
        and last.rank <= settings.per_kind
    )
