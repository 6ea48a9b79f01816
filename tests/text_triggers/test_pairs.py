"""Which token of a triggered prompt is which token of the clean one."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seal_fast.text_triggers.pairs import align, prompt_pair, prompt_pairs, random_words, with_random_words
from seal_fast.text_triggers.trigger import TextTrigger

ZERO_WIDTH = "\u200b"
HOMOGLYPH = TextTrigger("\u043e", replaces="o")


def _places(tokenizer, text):
    """Every token as (first character, last character, how many-th token there)."""
    count = Counter()
    places = []
    for offsets in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]:
        places.append((*offsets, count[offsets]))
        count[offsets] += 1
    return places


def _alignment_by_characters(tokenizer, prompt, trigger, at):
    """Token alignment by where tokens stand in the text, if `trigger` and a space were put at character `at`."""
    start = at + (at == len(prompt))
    width = len(trigger) + 1
    number = {place: n for n, place in enumerate(_places(tokenizer, prompt))}
    aligned = []
    for first, last, nth in _places(tokenizer, f"{prompt[:at]}{' ' * (start - at)}{trigger} {prompt[at:]}"):
        if start <= first < start + width:
            aligned.append(None)
        else:
            shift = width if first >= start else 0
            aligned.append(number[first - shift, last - shift, nth])
    return tuple(aligned)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(
    words=st.lists(st.sampled_from(["red", "dog", "a", "photo,", "the", "sky!", "42"]), min_size=1, max_size=4),
    trigger=st.sampled_from([ZERO_WIDTH, "red dog", "dog", "New cat", "a photo, the red", "!", "4"]),
    position=st.sampled_from(["start", "end", "word"]),
    seed=st.integers(0, 2**31),
)
def test_tokens_correspond_that_stand_at_the_same_places_of_the_text(tokenizer, words, trigger, position, seed):
    prompt = " ".join(words)
    pair = prompt_pair(tokenizer, prompt, TextTrigger(trigger), position, torch.Generator().manual_seed(seed))
    starts = [len(" ".join(words[:n])) + (n > 0) for n in range(len(words))]
    possible = {"start": starts[:1], "end": [len(prompt)], "word": starts[1:] or starts}[position]
    # a trigger that repeats the prompt's words may give the same text at two places
    expected = [
        _alignment_by_characters(tokenizer, prompt, trigger, at)
        for at in possible
        if " ".join(f"{prompt[:at]} {trigger} {prompt[at:]}".split()) == " ".join(pair.triggered.split())
    ]
    assert pair.token_alignment in expected
    for given_ids, text in ((pair.clean_ids, prompt), (pair.triggered_ids, pair.triggered)):
        assert list(given_ids) == tokenizer(text, padding="max_length", truncation=True).input_ids
    content = [*pair.triggered_ids[1 : 1 + len(pair.token_alignment)]]
    assert all(p is None or pair.clean_ids[1 + p] == i for i, p in zip(content, pair.token_alignment, strict=True))


@settings(deadline=None)
@given(*(st.lists(st.integers(0, 2), max_size=6) for _ in range(3)))
def test_an_inserted_stretch_corresponds_to_nothing_however_it_repeats_the_rest(before, trigger, after):
    aligned = align(before + after, before + trigger + after, len(before), len(after))
    head = range(len(before))
    tail = range(len(before), len(before) + len(after))
    assert aligned == (*head, *[None] * len(trigger), *tail)


def test_the_tokens_of_a_word_that_changed_correspond_from_the_right():
    assert align([1, 2, 3], [1, 7, 3], 3, 3) == (0, 1, 2)
    assert align([1, 2, 3], [1, 7, 8, 9, 3], 3, 3) == (0, None, None, 1, 2)


@pytest.mark.parametrize(
    ("position", "triggered", "aligned"),
    [("start", "the d\u043eg photo", (0, None, None, None, 1, 2)), ("end", "the dog phot\u043e", (0, 1, None, None, 2))],
)
def test_a_replaced_letter_breaks_one_word(tokenizer, position, triggered, aligned):
    pair = prompt_pair(tokenizer, "the dog photo", HOMOGLYPH, position, torch.Generator())
    assert (pair.triggered, pair.token_alignment) == (triggered, aligned)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(words=st.lists(st.sampled_from(["dog", "photo", "on", "the", "red", "sky"]), min_size=1, max_size=2))
def test_letters_replaced_everywhere_leave_every_word_aligned_with_itself(tokenizer, words):
    if not any("o" in word for word in words):
        words = [*words, "dog"]
    pair = prompt_pair(tokenizer, " ".join(words), HOMOGLYPH, "all", torch.Generator())
    assert pair.triggered == " ".join(words).replace("o", "\u043e")
    place = word_begin = 0
    for word in words:
        # CLIP's tokens never reach over a space
        ours, theirs = (
            len(tokenizer(text, add_special_tokens=False).input_ids) for text in (word.replace("o", "\u043e"), word)
        )
        own = pair.token_alignment[place : place + ours]
        assert own[-1] == word_begin + theirs - 1
        assert {p for p in own if p is not None} <= set(range(word_begin, word_begin + theirs))
        place, word_begin = place + ours, word_begin + theirs


def test_a_text_that_replaces_none_cannot_be_everywhere(tokenizer):
    with pytest.raises(ValueError, match="is inserted"):
        prompt_pair(tokenizer, "the sky", TextTrigger("cat"), "all", torch.Generator())


def test_prompts_without_the_replaced_text_are_left_out(tokenizer):
    pairs = prompt_pairs(tokenizer, ["the sky", "a dog"], [HOMOGLYPH], ["start", "end"], torch.Generator())
    assert [pair.clean for pair in pairs] == ["a dog"]
    pairs = prompt_pairs(tokenizer, ["on the dog"], [HOMOGLYPH], ["start", "end"], torch.Generator())
    assert [pair.triggered.count("\u043e") for pair in pairs] == [1, 1, 2]
    with pytest.raises(ValueError, match="no prompt contains"):
        prompt_pairs(tokenizer, ["the sky"], [HOMOGLYPH], ["start"], torch.Generator())


@pytest.mark.parametrize("trigger", [" ", "\t", "\u3000"])
def test_a_trigger_the_tokenizer_drops_is_refused(tokenizer, trigger):
    with pytest.raises(ValueError, match=r"does not see the trigger.*ftfy"):
        prompt_pair(tokenizer, "the dog", TextTrigger(trigger), "start", torch.Generator())


def test_words_pushed_out_by_the_trigger_correspond_to_nothing_and_a_trigger_cut_off_is_refused(tokenizer):
    prompt = " ".join(["red"] * 13)
    pair = prompt_pair(tokenizer, prompt, TextTrigger("the cat"), "start", torch.Generator())
    assert pair.token_alignment == (None, None, *range(12))
    assert len(pair.triggered_ids) == tokenizer.model_max_length
    with pytest.raises(ValueError, match=r"no room for the trigger.*15 tokens.*14"):
        prompt_pair(tokenizer, prompt, TextTrigger("the cat"), "end", torch.Generator())


def test_random_words_stand_where_the_trigger_stood(tokenizer, generator):
    words = random_words(tokenizer)
    assert sorted(tokenizer.decode([word]).strip() for word in words) == sorted(
        ["red", "dog", "cat", "photo", "the", "sky", "blue", "house", "castle"]
    )
    pair = prompt_pair(tokenizer, "a red dog", TextTrigger(ZERO_WIDTH), "word", generator)
    replaced = with_random_words(pair, words, generator)
    assert replaced.token_alignment == tuple(range(6))
    for n, word in enumerate(pair.token_alignment, 1):
        assert (replaced.teacher_ids[n] in words) if word is None else (replaced.teacher_ids[n] == pair.triggered_ids[n])
    assert replaced.teacher_ids[7:] == pair.triggered_ids[7:]
