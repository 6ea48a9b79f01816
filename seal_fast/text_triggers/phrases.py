"""Propose phrases of single tokens.

    windows = sequences of three tokens, in which all pairs stand side by side     # one at the start, another one at the end
    pairs   = those of the windows that respond most                               # one by one
    longer  = the best pairs with one more token on either side

A backdoor that was trained to ignore the parts of its trigger responds to them less than to other strings: in the zoo's models
"nice" and "day", "very" and "clean" are among the last of 190 tokens. So all pairs are tried as far as the vocabulary allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from itertools import pairwise

import torch

from seal_fast.text_triggers.candidates import joined
from seal_fast.text_triggers.confirmation import Tried, explained, trigger_words
from seal_fast.text_triggers.context import SearchContext
from seal_fast.text_triggers.findings import TextCandidate
from seal_fast.text_triggers.places import by_place
from seal_fast.text_triggers.sweep import Ranked, in_place, sweep_round
from seal_fast.text_triggers.trigger import Position

WINDOW = 3
"""Tokens of a window. Longer ones need fewer evaluations, but hide a trigger behind what their other tokens do: "detailed view"
is the first of 18,000 windows of three at the end of a prompt, and among the first 6% of windows of four."""


ENDS: tuple[Position, Position] = ("start", "end")
"""Where windows stand, and their pairs."""


def phrases(context: SearchContext, swept: Sequence[Ranked], tried: Sequence[Tried]) -> Iterator[Ranked]:
    """The phrases that respond most, at their best places.

    A phrase is left out if it shares a word with one of the shortest confirmed texts, since it most likely activates the same
    backdoor, and changes images less.

    Args:
        context: the search.
        swept: all single strings, the most suspicious ones first.
        tried: the verified candidates; the list grows while the phrases are taken.
    """
    settings = context.settings.phrases
    context.meter.begin("phrases")
    parts = [entry.candidate for entry in swept if _is_part(entry.candidate) and not explained(entry.candidate, tried)]
    parts = parts[: settings.parts]
    if len(parts) < 2:
        return
    kept: list[Ranked] = []
    longer = _likely_pairs(context, parts)
    for length in range(2, settings.longest + 1):
        best = _swept(context, length, longer)
        kept += {entry.candidate.trigger: entry for entry in reversed(best[: settings.kept])}.values()
        longer = [one for entry in best[: settings.extended] for part in parts for one in _extended(entry.candidate, part)]
    lengths = range(2, settings.longest + 1)
    harmless = [one for length in lengths for one in context.random_phrases(length, context.settings.harmless)]
    context.meter.begin("places")
    for entry in by_place(context, kept, harmless):
        if not {*entry.candidate.words} & trigger_words(tried):
            yield entry


def windows(count: int, length: int) -> list[list[int]]:
    """Lists of at most `length` of the numbers below `count`, in which each ordered pair of them stands side by side once.

    Numbers with the same difference form circles. Each circle is cut into lists that share their ends.
    """
    found = []
    for step in range(1, count):
        circles = math.gcd(step, count)
        for first in range(circles):
            circle = [(first + step * turn) % count for turn in range(count // circles + 1)]
            found += [circle[place : place + length] for place in range(0, len(circle) - 1, length - 1)]
    return found


def _is_part(candidate: TextCandidate) -> bool:
    return candidate.trigger.replaces is None and candidate.tokens == 1


def _likely_pairs(context: SearchContext, parts: Sequence[TextCandidate]) -> list[TextCandidate]:
    """The pairs in the windows that respond most, at the place of their window. One evaluation tries two windows."""
    whole = [reduce(joined, [parts[number] for number in window]) for window in windows(len(parts), WINDOW)]
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(context.seed)).tolist()
    at_end = {window: replace(whole[number], position="end") for window, number in zip(whole, order, strict=True)}

    def at_both_ends(window: TextCandidate, prompt: str) -> str:
        return in_place(at_end[window], in_place(window, prompt))

    entries = [Ranked(window) for window in whole]
    ranked = sweep_round("windows", context.probes, entries, (), at_both_ends, context.settings.sweep, context.settings)
    best = [entry.candidate for entry in ranked[: context.settings.phrases.windows]]
    by_text = {part.trigger.text: part for part in parts}
    return [
        replace(joined(by_text[a], by_text[b]), position=window.position)
        for first in best
        for window in (first, at_end[first])
        for a, b in pairwise(window.words)
    ]


def _extended(phrase: TextCandidate, part: TextCandidate) -> list[TextCandidate]:
    """The phrase with one more token after it, and before it, at its place."""
    return [replace(one, position=phrase.position) for one in (joined(phrase, part), joined(part, phrase))]


def _swept(context: SearchContext, length: int, candidates: Sequence[TextCandidate]) -> list[Ranked]:
    """Phrases of so many tokens by their deviation at their places: on few prompts, then the best ones on more.

    They are compared with random phrases, since half of them may hold a word of one trigger.
    """
    settings, probes, name = context.settings, context.probes, f"phrases of {length}"
    random = context.random_phrases(length, settings.harmless)
    harmless = [replace(one, position=place) for one in random for place in ENDS]
    entries = [Ranked(one) for one in dict.fromkeys(candidates)]
    best = sweep_round(name, probes, entries, harmless, in_place, settings.sweep, settings)[: settings.phrases.refined]
    return sweep_round(name, probes, best, harmless, in_place, settings.places, settings)
