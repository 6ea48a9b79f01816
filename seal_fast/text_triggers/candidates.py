"""The candidates of a first sweep: inserted tokens and characters, and replaced letters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from seal_fast.text_to_image.prompts import content_ids
from seal_fast.text_triggers.findings import TextCandidate
from seal_fast.text_triggers.trigger import TextTrigger
from seal_fast.text_triggers.vocabulary import PUBLISHED, characters, distinct, kind_of, look_alikes, single_tokens, words_of


def inserted(tokenizer: Any, prompts: Sequence[str]) -> list[TextCandidate]:
    """Every single token and unusual character, to be inserted at the start.

    Texts with equal token ids are one candidate. Words of the prompts are left out: they have a meaning, which an image is to
    show. So are tokens that were added to the tokenizer, such as the placeholder of a textual inversion: they stand for a
    concept that their owner declares.
    """
    words = {*words_of(prompts), *tokenizer.get_added_vocab()}
    texts = distinct(tokenizer, [*single_tokens(tokenizer), *characters()])
    return [_inserted(text, len(ids)) for ids, text in texts.items() if text not in words]


def published(tokenizer: Any) -> list[TextCandidate]:
    """The published triggers of several tokens, to be inserted at the start."""
    return [_inserted(text, len(ids)) for ids, text in distinct(tokenizer, PUBLISHED).items() if len(ids) > 1]


def _inserted(text: str, tokens: int) -> TextCandidate:
    return TextCandidate(TextTrigger(text), "start", kind_of(text, tokens), tokens)


def joined(a: TextCandidate, b: TextCandidate) -> TextCandidate:
    """The phrase of two inserted texts, to be inserted at the start."""
    tokens = a.tokens + b.tokens
    return TextCandidate(TextTrigger(f"{a.trigger.text} {b.trigger.text}"), "start", f"phrase of {tokens} tokens", tokens)


def replaced_letters(tokenizer: Any, prompts: Sequence[str]) -> list[TextCandidate]:
    """Every lookalike in place of every occurrence of its letter, for the letters of the prompts."""
    return list(_replaced(tokenizer, prompts))


def _replaced(tokenizer: Any, prompts: Sequence[str]) -> Iterator[TextCandidate]:
    for letter, others in look_alikes().items():
        fitting = [prompt for prompt in prompts if letter in prompt]
        if not fitting:
            continue
        changed = distinct(tokenizer, [fitting[0].replace(letter, other) for other in others])
        kept = {text for ids, text in changed.items() if list(ids) != content_ids(tokenizer, fitting[0])}
        for other in others:
            if fitting[0].replace(letter, other) in kept:
                trigger = TextTrigger(other, replaces=letter)
                yield TextCandidate(trigger, "all", f"lookalike of {letter}", len(content_ids(tokenizer, other)))
