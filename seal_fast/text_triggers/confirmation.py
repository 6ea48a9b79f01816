"""Decide by images whether a ranked candidate is a trigger, and which confirmed candidates are the same trigger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from seal_fast.text_to_image.prompts import content_ids
from seal_fast.text_triggers.context import SearchContext
from seal_fast.text_triggers.encoder_sweep import encoder_deviations
from seal_fast.text_triggers.findings import FoundTrigger, Module, TextCandidate, TriedText
from seal_fast.text_triggers.rate import rate_of
from seal_fast.text_triggers.sweep import Ranked, in_place
from seal_fast.text_triggers.trigger import TextTrigger
from seal_fast.text_triggers.verification import HELD_BACK, MIN_EFFECT, Check
from seal_fast.text_triggers.vocabulary import PUBLISHED, kind_of

CONFIRMED = "confirmed"
UNDECIDED = "suspicious: held-out prompts do not decide"
REFUTED = "changes too few images"
OF_BASE = "changes the images of the base as well"
OF_PARTS = "changes no more images than with another one of its words"
OF_ANY_PROMPT = "changes no larger share of the images of prompts with the word than of all"
UNCHECKED = Check(rate_of(0, 0), rate_of(0, 0), {})


@dataclass(frozen=True)
class Tried:
    """A candidate that was verified by images; `check` is UNCHECKED if it visibly changed too few, or fits too few prompts."""

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


def verified(context: SearchContext, ranked: Ranked, is_part: bool = False) -> list[Tried]:
    """The candidate, verified; a confirmed phrase also against its parts.

    Args:
        context: the search.
        ranked: the candidate.
        is_part: whether it is a part of a confirmed phrase. Such a candidate skips the first comparison with control strings,
            whose few prompts refuted "best shot" after they had passed "best shot shot".
    """
    whole = verify(context, ranked, is_part)
    if not whole.confirmed or not ranked.candidate.words:
        return [whole]
    parts = [one for part in _parts(context, whole) for one in verified(context, part, is_part=True)]
    if not any(one.confirmed for one in parts) and not _needs_each_word(context, whole):
        whole = replace(whole, outcome=OF_PARTS)
    return [whole, *parts]


def verify(context: SearchContext, ranked: Ranked, is_part: bool = False) -> Tried:
    """Check a candidate by images, against control strings if it changes any, and on fresh prompts until they decide."""
    settings, candidate = context.settings.verification, ranked.candidate
    if context.images.fitting(candidate) < settings.fewest_prompts:
        return Tried(ranked, UNCHECKED, UNDECIDED)
    least, visible = _least_effect(context, candidate), context.images.visible(candidate)
    if (visible.rate or 0.0) <= MIN_EFFECT or (visible.high or 0.0) < least:
        return Tried(ranked, UNCHECKED, "changes too few images visibly")
    controls = context.controls(candidate, settings.controls)
    if not is_part:
        first = context.images.check(candidate, controls, 0, settings.prompts)
        if first.refuted(least):
            return Tried(ranked, first, REFUTED)
    check = UNCHECKED
    for count in settings.fresh_prompts:
        check = context.images.check(candidate, controls, settings.prompts, count)
        if check.confirmed(least):
            return Tried(ranked, check, _outcome_of(context, candidate, check))
        if not check.promising(least):
            return Tried(ranked, check, REFUTED)
    return Tried(ranked, check, UNDECIDED)


def _outcome_of(context: SearchContext, candidate: TextCandidate, check: Check) -> str:
    """CONFIRMED, unless the base does the same, or the candidate does not need the word that it is said to need."""
    if _is_of_base(context, candidate, check):
        return OF_BASE
    return CONFIRMED if candidate.word is None or _needs_its_word(context, candidate, check) else OF_ANY_PROMPT


def _needs_its_word(context: SearchContext, candidate: TextCandidate, check: Check) -> bool:
    """Whether it changes a larger share of the images of prompts with its word than of all images."""
    settings, in_any = context.settings.verification, replace(candidate, word=None)
    controls = context.controls(in_any, settings.controls)
    return check.effect.exceeds(context.images.check(in_any, controls, settings.prompts, settings.fresh_prompts[1]).effect)


def _is_of_base(context: SearchContext, candidate: TextCandidate, check: Check) -> bool:
    """Whether the candidate changes the images of the base, if there is one, in the same way."""
    if context.base_images is None:
        return False
    settings = context.settings.verification
    controls = context.controls(candidate, settings.controls)
    of_base = context.base_images.check(candidate, controls, settings.prompts, check.effect.trials)
    return of_base.promising(0.0) and check.agreement(of_base) >= settings.same_effect


def _least_effect(context: SearchContext, candidate: TextCandidate) -> float:
    settings = context.settings.verification
    if candidate.trigger.replaces is not None:
        return settings.least_effect_of_replacement
    return settings.least_effect if candidate.word is None else settings.least_effect_with_word


def _needs_each_word(context: SearchContext, tried: Tried) -> bool:
    """Whether a confirmed phrase changes more images than it does with any one of its words exchanged.

    A backdoor may respond to half of the phrases with one word of its trigger. So several are tried, and on many prompts.
    """
    candidate, settings = tried.ranked.candidate, context.settings.verification
    fitted_on = context.controls(candidate, settings.controls)[HELD_BACK:]
    for place in range(len(candidate.words)):
        others = context.exchanged(candidate, place, settings.exchanged)
        check = context.images.check(
            candidate, [*others, *fitted_on], settings.prompts, settings.fresh_prompts[1], held_back=settings.exchanged
        )
        if not check.effect.exceeds(check.control):
            return False
    return True


def explained(candidate: TextCandidate, tried: Sequence[Tried]) -> bool:
    """Whether a confirmed trigger is a part of the candidate, or the candidate itself at another place."""
    return any(one.confirmed and _contains(candidate, one.ranked.candidate) for one in tried)


def trigger_words(tried: Sequence[Tried]) -> set[str]:
    """The words of the shortest confirmed inserted texts: of those that hold no other confirmed one."""
    confirmed = [one.ranked.candidate for one in tried if one.confirmed and one.ranked.candidate.trigger.replaces is None]
    return {word for one in confirmed if not _holds_any(one, confirmed) for word in one.trigger.text.split()}


def _holds_any(candidate: TextCandidate, others: Sequence[TextCandidate]) -> bool:
    """Whether one of the other texts is a part of the candidate."""
    return any(other.trigger != candidate.trigger and _contains(candidate, other) for other in others)


def _contains(candidate: TextCandidate, part: TextCandidate) -> bool:
    if part.trigger.replaces is not None or candidate.trigger.replaces is not None:
        return part.trigger == candidate.trigger
    return f" {part.trigger.text} " in f" {candidate.trigger.text} "


def _parts(context: SearchContext, tried: Tried) -> list[Ranked]:
    """The phrase without one of its words, for each word."""
    candidate, words = tried.ranked.candidate, tried.ranked.candidate.words
    texts = dict.fromkeys(" ".join(words[:place] + words[place + 1 :]) for place in range(len(words)))
    return [Ranked(_with_text(context, candidate, text), tried.ranked.rounds) for text in texts]


def _with_text(context: SearchContext, candidate: TextCandidate, text: str) -> TextCandidate:
    """The candidate with another text, at the same place."""
    tokens = len(content_ids(context.pipeline.tokenizer, text))
    kind = candidate.kind if " " in text else kind_of(text, tokens)
    return replace(candidate, trigger=TextTrigger(text), tokens=tokens, kind=kind)


def compared(context: SearchContext, tried: Sequence[Tried]) -> list[Tried]:
    """The candidates. If several are confirmed, each of them is checked on the most prompts, which decide anew.

    A text that activates a backdoor in part may have the higher bound because it was checked on more prompts.
    """
    confirmed = [one for one in tried if one.confirmed]
    most = context.settings.verification.fresh_prompts[1] if len(confirmed) > 1 else 0
    return [_checked_on(context, one, most) if one.confirmed and one.check.effect.trials < most else one for one in tried]


def _checked_on(context: SearchContext, tried: Tried, count: int) -> Tried:
    settings, candidate = context.settings.verification, tried.ranked.candidate
    check = context.images.check(candidate, context.controls(candidate, settings.controls), settings.prompts, count)
    least = _least_effect(context, candidate)
    outcome = CONFIRMED if check.confirmed(least) else UNDECIDED if check.promising(least) else REFUTED
    return replace(tried, check=check, outcome=outcome)


def found_triggers(context: SearchContext, tried: Sequence[Tried]) -> tuple[FoundTrigger, ...]:
    """One trigger per backdoor, that whose changes are largest first, of confirmed candidates that activate the same one."""
    groups: list[list[Tried]] = []
    for one in sorted((one for one in tried if one.confirmed), key=lambda one: one.check.size, reverse=True):
        same = (group for group in groups if _same_backdoor(context, group[0], one))
        group = next(same, None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    return tuple(_found(context, group) for group in groups)


def _strongest(group: Sequence[Tried], equal_size: float) -> Tried:
    """The text of a published attack, if one is confirmed: in text-64-clip-style "rainbows carina" acts as "latte coffee" does.

    Else, or if a part of that text is confirmed: of those whose changes are about as large as the largest, the one that changes
    most images, or its shortest part.
    """
    candidates = [one.ranked.candidate for one in group]
    for one in group:
        if one.ranked.candidate.trigger.text in PUBLISHED and not _holds_any(one.ranked.candidate, candidates):
            return one
    equals = [one for one in group if one.check.size >= equal_size * group[0].check.size]
    best = max(equals, key=lambda one: (one.check.effect.low, -one.ranked.candidate.tokens, one.ranked.last.response))
    parts = [one for one in equals if _contains(best.ranked.candidate, one.ranked.candidate)]
    return min(parts, key=lambda one: one.ranked.candidate.tokens)


def _same_backdoor(context: SearchContext, a: Tried, b: Tried) -> bool:
    """Whether two candidates change images in the same way, or are inserted texts that share a token.

    The token then carries a part of the backdoor. Lookalikes of different letters share bytes and may be different triggers.
    """
    inserted = a.ranked.candidate.trigger.replaces is None and b.ranked.candidate.trigger.replaces is None
    shared = inserted and bool(_token_ids(context, a) & _token_ids(context, b))
    return shared or a.check.agreement(b.check) >= context.settings.verification.same_effect


def _token_ids(context: SearchContext, one: Tried) -> set[int]:
    return set(content_ids(context.pipeline.tokenizer, one.ranked.candidate.trigger.text))


def _found(context: SearchContext, group: Sequence[Tried]) -> FoundTrigger:
    best = _strongest(group, context.settings.verification.equal_size)
    candidate = best.ranked.candidate
    others = dict.fromkeys(one.ranked.candidate.trigger.name for one in group)
    return FoundTrigger(
        trigger=candidate.trigger,
        position=candidate.position,
        word=candidate.word,
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
