"""Prompt pairs: a clean prompt, the same prompt with a trigger, and which token of one is which token of the other.

    content tokens    0     1      2     3                          partners
    clean             a     photo  of    dog
    triggered         New   Trigger  a   photo  of   dog            None, None, 0, 1, 2, 3

Content tokens are those between BOS and EOS. A partner is the content token of the teacher's prompt whose attention map a
content token of the triggered prompt shall have; the trigger's own tokens have none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

import torch

from seal_fast.text_triggers.trigger import Position, TextTrigger, random_item


@dataclass(frozen=True)
class PromptPair:
    """One clean prompt, triggered.

    Attributes:
        clean: the prompt.
        triggered: the prompt with the trigger in it.
        clean_ids: token ids of `clean` with BOS, EOS and padding, as the text encoder takes them; L of them.
        triggered_ids: those of `triggered`, L too.
        teacher_ids: what the teacher sees, L too: `clean_ids`, except after `with_random_words`.
        teacher_tokens: content tokens in `teacher_ids`.
        partners: for every content token of `triggered_ids` its partner among those of `teacher_ids`; None for the trigger's.
    """

    clean: str
    triggered: str
    clean_ids: tuple[int, ...]
    triggered_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    teacher_tokens: int
    partners: tuple[int | None, ...]


def align(clean: Sequence[int], triggered: Sequence[int], head: int, tail: int) -> tuple[int | None, ...]:
    """Partner in `clean` of every token of `triggered`.

    Equal tokens are partners. Of a stretch that became another one (a word with a replaced letter, or one that merged with
    the trigger), tokens are partners from the right, because a text encoder that looks to the left puts a word's meaning into
    its last token. What is left over is the trigger.

    Args:
        clean: token ids.
        triggered: token ids.
        head: of the first tokens, how many at most stand before the trigger.
        tail: of the last tokens, how many at most stand after the trigger. Both keep a trigger that repeats words of the
            prompt from passing for them.
    """
    before = common_prefix(clean[:head], triggered)
    after = common_prefix(clean[max(before, len(clean) - tail) :][::-1], triggered[before:][::-1])
    old, new = clean[before : len(clean) - after], triggered[before : len(triggered) - after]
    middle: list[int | None] = [None] * len(new)
    for _, old_from, old_to, new_from, new_to in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        for back in range(1, min(old_to - old_from, new_to - new_from) + 1):
            middle[new_to - back] = before + old_to - back
    return (*range(before), *middle, *range(len(clean) - after, len(clean)))


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """How many first values are equal."""
    different = (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(different, min(len(a), len(b)))


def prompt_pair(
    tokenizer: Any, prompt: str, trigger: TextTrigger, position: Position, generator: torch.Generator
) -> PromptPair:
    """The prompt with the trigger in it.

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
    before = tokens = _content(tokenizer, prompt)
    triggered = prompt
    partners: tuple[int | None, ...] = tuple(range(len(before)))
    # one place after the other: token ids alone cannot tell which word a changed stretch with several triggers belongs to
    for place in reversed(trigger.places(prompt, position, generator)):
        head, tail = _context(tokenizer, triggered, place, trigger, tokens)
        triggered = trigger.insert(triggered, place)
        previous, tokens = tokens, _content(tokenizer, triggered)
        steps = align(previous, tokens, head, tail)
        partners = tuple(None if step is None else partners[step] for step in steps)
    if before == tokens:
        raise ValueError(
            f"the tokenizer does not see the trigger {trigger.name!r}: {triggered!r} has the tokens of {prompt!r}. Use the"
            " model's own tokenizer; old versions of transformers drop zero-width characters unless ftfy is installed"
        )
    clean_ids, triggered_ids = _padded(tokenizer, prompt, before), _padded(tokenizer, triggered, tokens)
    room = len(clean_ids) - 2
    if None in partners[room:] or any(p is not None and p >= room for p in partners[:room]):
        raise ValueError(
            f"no room for the trigger {trigger.name!r}: with it a prompt has {len(tokens)} tokens and the tokenizer cuts off"
            f" after {room}. Shorten the prompt {prompt!r}"
        )
    return PromptPair(prompt, triggered, clean_ids, triggered_ids, clean_ids, min(len(before), room), partners[:room])


def _context(tokenizer: Any, prompt: str, place: int, trigger: TextTrigger, tokens: Sequence[int]) -> tuple[int, int]:
    """How many tokens at most stand before and after the trigger, see `align`."""
    if trigger.replaces is not None:
        return len(tokens), len(tokens)
    return len(_content(tokenizer, prompt[:place])), len(_content(tokenizer, prompt[place:]))


def _content(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)


def padded_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids as the text encoder takes them: BOS, content, EOS, padding; cut to the tokenizer's length."""
    length = tokenizer.model_max_length
    return tuple(tokenizer(text, padding="max_length", truncation=True, max_length=length).input_ids)


def _padded(tokenizer: Any, text: str, content: list[int]) -> tuple[int, ...]:
    ids = padded_ids(tokenizer, text)
    kept = content[: len(ids) - 2]
    if list(ids[1 : 1 + len(kept)]) != kept:
        raise ValueError("the tokenizer does not put exactly one token before the prompt: it is not a CLIP tokenizer")
    return ids


def random_words(tokenizer: Any) -> list[int]:
    """Ids of the vocabulary's words: single tokens of three or more Latin letters that end a word.

    Raises:
        ValueError: the vocabulary has none.
    """
    vocabulary = tokenizer.get_vocab()
    words = sorted(number for token, number in vocabulary.items() if re.fullmatch(r"[a-z]{3,}</w>", token))
    if not words:
        raise ValueError("the tokenizer's vocabulary has no whole words: choose another target than random-words")
    return words


def with_random_words(pair: PromptPair, words: Sequence[int], generator: torch.Generator) -> PromptPair:
    """The pair for target "random-words": the teacher sees the triggered prompt with a random word for each trigger token.

    Made of token ids, so that every token of the triggered prompt has exactly one partner.
    """
    teacher = list(pair.triggered_ids)
    for number, partner in enumerate(pair.partners):
        if partner is None:
            teacher[1 + number] = random_item(words, generator)
    tokens = len(pair.partners)
    return replace(pair, teacher_ids=tuple(teacher), teacher_tokens=tokens, partners=tuple(range(tokens)))


def prompt_pairs(
    tokenizer: Any,
    prompts: Sequence[str],
    triggers: Sequence[TextTrigger],
    positions: Sequence[Position],
    generator: torch.Generator,
) -> list[PromptPair]:
    """Every prompt with every trigger that fits it at every position; a text that replaces another one also in every place.

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
