"""Decide by images whether a ranked candidate is a trigger, and which confirmed candidates are the same trigger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from seal_fast.text_to_image.prompts import content_ids
from seal_fast.text_triggers.context import SearchContext
from seal_fast.text_triggers.encoder_sweep import encoder_deviations
from seal_fast.text_triggers.findings import FoundTrigger, Module, TextCandidate, TriedText
from seal_fast.text_triggers.rate import rate_of
from seal_fast.text_triggers.sweep import Ranked, in_place
from seal_fast.text_triggers.trigger import TextTrigger
from seal_fast.text_triggers.verification import MIN_EFFECT, Check

CONFIRMED = "confirmed"
UNDECIDED = "suspicious: too few prompts to decide"
REFUTED = "changes too few images"
OF_BASE = "changes the images of the base as well"
FEWEST_FRESH = 2
"""Least fresh prompts, as a change detector is fitted on no fewer."""
UNCHECKED = Check(rate_of(0, 0), rate_of(0, 0), torch.zeros(0))


@dataclass(frozen=True)
class Tried:
    """A candidate that was verified by images; `check` is UNCHECKED if it changed them too little."""

    ranked: Ranked
    check: Check
    outcome: str

    @property
    def confirmed(self) -> bool:
        return self.outcome == CONFIRMED

    @property
    def undecided(self) -> bool:
        return self.outcome == UNDECIDED

    def record(self) -> TriedText:
        return TriedText(self.ranked.candidate, self.ranked.rounds, self.check.effect, self.check.control, self.outcome)


def verify(context: SearchContext, ranked: Ranked) -> Tried:
    """Check a candidate by images, against control strings if it changes any, and on fresh prompts until they decide."""
    settings, candidate = context.settings.verification, ranked.candidate
    if context.images.fitting(candidate) < settings.prompts + FEWEST_FRESH:
        return Tried(ranked, UNCHECKED, UNDECIDED)
    if context.images.visible(candidate, settings.prompts) <= MIN_EFFECT:
        return Tried(ranked, UNCHECKED, "hardly changes images")
    inserted = candidate.trigger.replaces is None
    least = settings.least_effect if inserted else settings.least_effect_of_replacement
    controls = context.controls(candidate, settings.controls if inserted else settings.controls_of_replacement)
    check = context.images.check(candidate, controls, 0, settings.prompts)
    for count in settings.fresh_prompts:
        if check.refuted(least):
            return Tried(ranked, check, REFUTED)
        check = context.images.check(candidate, controls, settings.prompts, count)
        if check.confirmed(least):
            of_base = context.base_images and context.base_images.check(candidate, controls, settings.prompts, count)
            return Tried(ranked, check, OF_BASE if of_base and of_base.promising(0.0) else CONFIRMED)
    return Tried(ranked, check, UNDECIDED if check.promising(least) else REFUTED)


def explained(candidate: TextCandidate, tried: Sequence[Tried]) -> bool:
    """Whether a confirmed trigger is a part of the candidate, or the candidate itself at another place."""
    return any(one.confirmed and _contains(candidate, one.ranked.candidate) for one in tried)


def _contains(candidate: TextCandidate, part: TextCandidate) -> bool:
    if part.trigger.replaces is not None or candidate.trigger.replaces is not None:
        return part.trigger == candidate.trigger
    return f" {part.trigger.text} " in f" {candidate.trigger.text} "


def minimal(context: SearchContext, tried: Tried) -> list[Tried]:
    """The phrase without one of its words, for each word, verified; nothing for a single word."""
    words = tried.ranked.candidate.trigger.text.split(" ")
    if tried.ranked.candidate.trigger.replaces is not None or len(words) < 2:
        return []
    shorter = (" ".join(words[:place] + words[place + 1 :]) for place in range(len(words)))
    found = []
    for text in shorter:
        tokens = len(content_ids(context.pipeline.tokenizer, text))
        candidate = replace(tried.ranked.candidate, trigger=TextTrigger(text), tokens=tokens)
        found.append(verify(context, Ranked(candidate, tried.ranked.rounds)))
    return found


def found_triggers(context: SearchContext, tried: Sequence[Tried]) -> tuple[FoundTrigger, ...]:
    """One trigger per backdoor: of confirmed candidates that activate the same one, the strongest with fewest tokens."""
    groups: list[list[Tried]] = []
    for one in sorted((one for one in tried if one.confirmed), key=_strength, reverse=True):
        same = (group for group in groups if _same_backdoor(context, group[0], one))
        group = next(same, None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    return tuple(_found(context, group) for group in groups)


def _strength(one: Tried) -> tuple[float, int, float]:
    return one.check.effect.low or 0.0, -one.ranked.candidate.tokens, one.ranked.last.response


def _same_backdoor(context: SearchContext, a: Tried, b: Tried) -> bool:
    """Whether two candidates change images in the same way, or share a token, which then carries a part of the backdoor."""
    cosine = float(torch.dot(a.check.direction, b.check.direction))
    return cosine >= context.settings.verification.same_effect or bool(_token_ids(context, a) & _token_ids(context, b))


def _token_ids(context: SearchContext, one: Tried) -> set[int]:
    return set(content_ids(context.pipeline.tokenizer, one.ranked.candidate.trigger.text))


def _found(context: SearchContext, group: Sequence[Tried]) -> FoundTrigger:
    best, candidate = group[0], group[0].ranked.candidate
    others = dict.fromkeys(one.ranked.candidate.trigger.name for one in group[1:])
    return FoundTrigger(
        trigger=candidate.trigger,
        position=candidate.position,
        code_points=tuple(f"U+{ord(character):04X}" for character in candidate.trigger.text),
        token_ids=tuple(content_ids(context.pipeline.tokenizer, candidate.trigger.text)),
        module=_module(context, candidate),
        effect=best.check.effect,
        control=best.check.control,
        rounds=best.ranked.rounds,
        also=tuple(name for name in others if name != candidate.trigger.name),
        control_string=context.controls(candidate, 1)[0].trigger,
    )


def _module(context: SearchContext, candidate: TextCandidate) -> Module:
    """The text encoder if it moves its hidden states for this candidate as for no other string of its kind."""
    settings = context.settings
    others = [candidate, *context.controls(candidate, settings.encoder_controls)]
    deviation = encoder_deviations(context.pipeline, others, context.probes.model.prompts, in_place, settings)[0]
    return "text_encoder" if float(deviation) > settings.encoder_limit else "unet"
