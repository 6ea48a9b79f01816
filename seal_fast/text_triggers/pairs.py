"""Prompt pairs: a clean prompt, the same prompt with a trigger, and the token alignment of the two.

    content tokens    0     1      2     3                          token alignment
    clean             a     photo  of    dog
    triggered         New   Trigger  a   photo  of   dog            None, None, 0, 1, 2, 3

Content tokens are those between BOS and EOS. The token alignment gives for every content token of the triggered prompt the
corresponding content token of the teacher's prompt, whose attention map it is to have. The trigger's own tokens correspond to
none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

import torch

from seal_fast.text_to_image.prompts import content_ids, token_ids
from seal_fast.text_triggers.trigger import Position, TextTrigger, random_item

TokenAlignment = tuple[int | None, ...]


@dataclass(frozen=True)
class PromptPair:
    """A clean prompt and the same prompt with the trigger.

    Attributes:
        clean: the clean prompt.
        triggered: the prompt with the trigger in it.
        clean_ids: L token ids of `clean` with BOS, EOS and padding, as the text encoder takes them.
        triggered_ids: L token ids of `triggered`.
        teacher_ids: L token ids of the teacher's prompt: `clean_ids`, except after `with_random_words`.
        teacher_tokens: number of content tokens in `teacher_ids`.
        token_alignment: for every content token of `triggered_ids` the corresponding one of `teacher_ids`, None for the
            trigger's.
    """

    clean: str
    triggered: str
    clean_ids: tuple[int, ...]
    triggered_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    teacher_tokens: int
    token_alignment: TokenAlignment


def align(clean: Sequence[int], triggered: Sequence[int], head: int, tail: int) -> TokenAlignment:
    """The token of `clean` that corresponds to each token of `triggered`.

    Equal tokens correspond. A stretch of tokens may have become another one, as a word with a replaced letter does, or a word
    that merged with the trigger. Its tokens correspond from the right, because a text encoder that looks only to the left puts
    a word's meaning into its last token. The remaining tokens are the trigger's.

    Args:
        clean: token ids.
        triggered: token ids.
        head: how many of the first tokens at most stand before the trigger. Together with `tail` it keeps a trigger that
            repeats words of the prompt from being aligned with them.
        tail: how many of the last tokens at most stand after the trigger.
    """
    before = common_prefix(clean[:head], triggered)
    after = common_prefix(clean[max(before, len(clean) - tail) :][::-1], triggered[before:][::-1])
    old, new = clean[before : len(clean) - after], triggered[before : len(triggered) - after]
    changed: list[int | None] = [None] * len(new)
    for _, old_from, old_to, new_from, new_to in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        for back in range(1, min(old_to - old_from, new_to - new_from) + 1):
            changed[new_to - back] = before + old_to - back
    return (*range(before), *changed, *range(len(clean) - after, len(clean)))


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """Length of the longest common prefix."""
    different = (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(different, min(len(a), len(b)))


def prompt_pair(
    tokenizer: Any, prompt: str, trigger: TextTrigger, position: Position, generator: torch.Generator
) -> PromptPair:
    """The prompt, paired with the same prompt with the trigger in it.

    Args:
        tokenizer: a CLIP tokenizer.
        prompt: the clean prompt.
        trigger: one that fits the prompt.
        position: where the trigger stands, see `Position`.
        generator: draws the random place.

    Raises:
        ValueError: an empty prompt, or a trigger that does not fit the prompt or the position, that the tokenizer drops, or for
            which the tokenizer has no room.
    """
    if not prompt.strip():
        raise ValueError("a prompt must not be empty")
    clean = content_ids(tokenizer, prompt)
    triggered, tokens, aligned = _insert(tokenizer, prompt, clean, trigger, trigger.places(prompt, position, generator))
    if clean == tokens:
        raise ValueError(
            f"the tokenizer does not see the trigger {trigger.name!r}: {triggered!r} has the tokens of {prompt!r}. Use the"
            " model's own tokenizer; old versions of transformers drop zero-width characters unless ftfy is installed"
        )
    clean_ids, triggered_ids = _padded(tokenizer, prompt, clean), _padded(tokenizer, triggered, tokens)
    room = len(clean_ids) - 2
    if None in aligned[room:] or any(token is not None and token >= room for token in aligned[:room]):
        raise ValueError(
            f"no room for the trigger {trigger.name!r}: with it a prompt has {len(tokens)} tokens and the tokenizer cuts off"
            f" after {room}. Shorten the prompt {prompt!r}"
        )
    return PromptPair(prompt, triggered, clean_ids, triggered_ids, clean_ids, min(len(clean), room), aligned[:room])


def _insert(
    tokenizer: Any, prompt: str, tokens: list[int], trigger: TextTrigger, places: Sequence[int]
) -> tuple[str, list[int], TokenAlignment]:
    """The triggered prompt, its content tokens, and the token of the clean prompt that corresponds to each."""
    text = prompt
    aligned: TokenAlignment = tuple(range(len(tokens)))
    # one place after the other: if one stretch of tokens holds several changes, nothing tells which token belongs to which word
    for place in reversed(places):
        # a replacement changes tokens in its place, so all others may stand before it or after it
        head = tail = len(tokens)
        if trigger.replaces is None:
            head, tail = (len(content_ids(tokenizer, part)) for part in (text[:place], text[place:]))
        text, before = trigger.insert(text, place), tokens
        tokens = content_ids(tokenizer, text)
        aligned = tuple(None if token is None else aligned[token] for token in align(before, tokens, head, tail))
    return text, tokens, aligned


def _padded(tokenizer: Any, text: str, content: list[int]) -> tuple[int, ...]:
    ids = tuple(token_ids(tokenizer, [text])[0].tolist())
    kept = content[: len(ids) - 2]
    if list(ids[1 : 1 + len(kept)]) != kept:
        raise ValueError("the tokenizer does not put exactly one token before the prompt: it is not a CLIP tokenizer")
    return ids


def random_words(tokenizer: Any) -> list[int]:
    """Token ids of the vocabulary's words: single tokens of three or more Latin letters that end a word.

    Raises:
        ValueError: the vocabulary has none.
    """
    vocabulary = tokenizer.get_vocab()
    words = sorted(number for token, number in vocabulary.items() if re.fullmatch(r"[a-z]{3,}</w>", token))
    if not words:
        raise ValueError("the tokenizer's vocabulary has no whole words: choose another target than random-words")
    return words


def with_random_words(pair: PromptPair, words: Sequence[int], generator: torch.Generator) -> PromptPair:
    """The pair for target "random-words": the teacher's prompt is the triggered one with a random word for each trigger token.

    The teacher's prompt consists of token ids, so that every token of the triggered prompt has a counterpart.
    """
    teacher = list(pair.triggered_ids)
    for number, clean in enumerate(pair.token_alignment):
        if clean is None:
            teacher[1 + number] = random_item(words, generator)
    tokens = len(pair.token_alignment)
    return replace(pair, teacher_ids=tuple(teacher), teacher_tokens=tokens, token_alignment=tuple(range(tokens)))


def prompt_pairs(
    tokenizer: Any,
    prompts: Sequence[str],
    triggers: Sequence[TextTrigger],
    positions: Sequence[Position],
    generator: torch.Generator,
) -> list[PromptPair]:
    """Every prompt with every trigger that fits it at every position; replacements also at "all" places.

    Raises:
        ValueError: see `prompt_pair`; or a trigger that fits no prompt.
    """
    pairs: dict[tuple[str, str], PromptPair] = {}
    for trigger in triggers:
        places: Sequence[Position] = positions if trigger.replaces is None else (*positions, "all")
        for prompt in trigger.fitting(prompts):
            for position in places:
                pair = prompt_pair(tokenizer, prompt, trigger, position, generator)
                pairs[pair.clean, pair.triggered] = pair
    return list(pairs.values())
