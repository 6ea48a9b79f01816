"""Propose a confirmed phrase with one of its words exchanged for the one to which the UNet responds most.

A backdoor may respond in part to one word of its trigger beside another one. The search then confirms a phrase with that word
before the trigger itself, whose other word does nothing alone and may not be among the parts of phrases.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from seal_fast.text_triggers.confirmation import Tried
from seal_fast.text_triggers.context import SearchContext
from seal_fast.text_triggers.findings import TextCandidate
from seal_fast.text_triggers.search_settings import RoundSettings
from seal_fast.text_triggers.sweep import Ranked, in_place, sweep_round
from seal_fast.text_triggers.trigger import TextTrigger


def with_exchanged_words(context: SearchContext, swept: Sequence[Ranked], tried: Sequence[Tried]) -> Iterator[Ranked]:
    """The confirmed phrase with the largest changes, for each of its words with the word that responds most in its place."""
    settings = context.settings
    phrases = [one for one in tried if one.confirmed and one.ranked.candidate.words]
    if not phrases:
        return
    context.meter.begin("phrases")
    phrase = max(phrases, key=lambda one: one.check.size).ranked.candidate
    single = (entry.candidate for entry in swept if entry.candidate.tokens == 1 and entry.candidate.trigger.replaces is None)
    others = [one.trigger.text for one in single][: settings.phrases.exchanged]
    for place in range(len(phrase.words)):
        entries = [Ranked(_exchanged(phrase, place, other)) for other in dict.fromkeys([phrase.words[place], *others])]
        best = _most_responding(context, "exchanged words", entries, settings.sweep)[: settings.phrases.kept]
        yield _most_responding(context, "places", best, settings.places)[0]


def _exchanged(phrase: TextCandidate, place: int, other: str) -> TextCandidate:
    """The phrase with another word, of one token, at this place."""
    words = [*phrase.words[:place], other, *phrase.words[place + 1 :]]
    return replace(phrase, trigger=TextTrigger(" ".join(words)))


def _most_responding(context: SearchContext, name: str, entries: Sequence[Ranked], round: RoundSettings) -> list[Ranked]:
    ranked = sweep_round(name, context.probes, entries, (), in_place, round, context.settings)
    return sorted(ranked, key=lambda entry: entry.last.response, reverse=True)
