"""Propose strings that act only in prompts with one word.

A backdoor may exchange one object for another, and leave every prompt without that object alone. Too few images of all prompts
change to confirm its trigger. The UNet responds far more where the prompt holds the word.

Of the thousands of strings and the words of the prompts some pair stands out in any model, by a little. So a string is proposed
only if it leads by far: the next one of its kind that needs a word, or the next of all kinds. Two such triggers of one kind in
one model hide each other. Images of held-out prompts with the word then decide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from seal_fast.text_triggers.confirmation import Tried, explained
from seal_fast.text_triggers.context import SearchContext
from seal_fast.text_triggers.findings import Round, TextCandidate
from seal_fast.text_triggers.ranking import best
from seal_fast.text_triggers.sweep import Ranked, at_each_place, in_place
from seal_fast.text_triggers.vocabulary import words_of

FEWEST_PROMPTS = 3
"""Least swept prompts with the word, and as many without it, whose responses are compared."""


def with_needed_word(context: SearchContext, swept: Sequence[Ranked], tried: Sequence[Tried]) -> Iterator[Ranked]:
    """The strings to which the prompts with one word respond most, and far more than to others of their kind.

    Each one is proposed for all prompts first, unless it was tried there. A trigger that acts in all of them needs no word.
    """
    settings = context.settings.needed_word
    context.meter.begin("words")
    words = _dividing_words(context)
    suspicious = (entry for entry in _suspicious(context, swept) if not explained(entry.candidate, tried))
    found = [_best_pair(context, entry, words) for entry in suspicious]
    pairs = [pair for pair in found if pair is not None]
    context.meter.begin("verification")
    known = {one.ranked.candidate for one in tried}
    for pair in pairs:
        if _leads(pair, pairs, settings.least_lead):
            for_all = replace(pair, candidate=replace(pair.candidate, word=None))
            yield from [pair] if for_all.candidate in known else [for_all, pair]


def _leads(pair: Ranked, pairs: Sequence[Ranked], least: float) -> bool:
    """Whether the prompts with its word respond as to another prompt, and `least` times as much as to others of its kind."""
    others = [one for one in pairs if one is not pair]
    kin = [one for one in others if one.candidate.kind == pair.candidate.kind] or others
    return pair.last.response >= max([1.0, *(least * one.last.response for one in kin)])


def _suspicious(context: SearchContext, swept: Sequence[Ranked]) -> list[Ranked]:
    """The inserted texts that lead the sweep, and those that lead their kind."""
    settings = context.settings.needed_word
    inserted = [entry for entry in swept if entry.candidate.trigger.replaces is None]
    deviations, kinds = [entry.last.deviation for entry in inserted], [entry.candidate.kind for entry in inserted]
    return [inserted[index] for index in best(deviations, kinds, settings.strings, settings.per_kind)]


def _dividing_words(context: SearchContext) -> dict[str, Tensor]:
    """Word -> which swept prompts hold it, bool [P]: words that some of them lack, and that enough held-out prompts hold."""
    fewest = context.settings.verification.fewest_prompts
    swept, held_out = (
        [set(words_of([one])) for one in some] for some in (context.probes.model.prompts, context.images.prompts)
    )
    found = {}
    for word in sorted(set().union(*swept)):
        held = torch.tensor([word in words for words in swept])
        enough = min(int(held.sum()), int((~held).sum())) >= FEWEST_PROMPTS
        if enough and sum(word in words for words in held_out) >= fewest:
            found[word] = held
    return found


def _best_pair(context: SearchContext, entry: Ranked, words: Mapping[str, Tensor]) -> Ranked | None:
    """The candidate at the place and with the word where it responds most; None if it acts without each word as well."""
    least, inside = math.log(context.settings.needed_word.least_lead), {}
    for place in at_each_place(entry.candidate):
        logs = _responses(context, place).clamp_min(1e-20).log()
        for word, held in words.items():
            if logs[held].mean() >= least + logs[~held].mean():
                inside[replace(place, word=word)] = float(logs[held].mean().exp())
    if not inside:
        return None
    pair = max(inside, key=inside.__getitem__)
    return Ranked(pair, (*entry.rounds, Round("word", 1, len(inside), 0.0, inside[pair])))


def _responses(context: SearchContext, candidate: TextCandidate) -> Tensor:
    """Response [P] of every swept prompt at the timestep of the sweep."""
    probe = context.probes.model
    texts = [[in_place(candidate, prompt)] for prompt in probe.prompts]
    return probe.respond(texts, [[place] for place in range(len(texts))], [len(probe.timesteps) - 1])[:, 0, 0]
