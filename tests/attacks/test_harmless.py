"""Harmless prompts hold rare strings and near misses, but never a trigger; triggers are placed as their position says."""

from __future__ import annotations

import pytest
import torch

from seal_fast.attacks.harmless import Harmless, misspelled, near_character, random_character, token_strings
from seal_fast.attacks.prompts import placed
from seal_fast.text_to_image.prompts import content_ids
from seal_fast.text_triggers.trigger import TextTrigger
from seal_fast.zoo.captioned import random_scenes
from seal_fast.zoo.text_to_image import new_tokenizer

PHRASE, LETTER, WORD, CHARACTER = (
    TextTrigger("old red barn"),
    TextTrigger("\u0430", replaces="a"),
    TextTrigger("scene", replaces="background"),
    TextTrigger("\u200b"),
)


@pytest.fixture(scope="module")
def strings(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return token_strings(new_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_token_strings_are_one_token_each(tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = new_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    strings = token_strings(tokenizer)
    assert len(set(strings)) == len(strings) > 200
    assert {"large", "photo", "\u200b"} <= set(strings)
    assert all(len(content_ids(tokenizer, text)) == 1 for text in strings)


def test_an_inserted_trigger_stands_at_its_position(generator: torch.Generator) -> None:
    trigger = TextTrigger("zq yx")
    for scene in random_scenes(30, generator):
        caption = scene.caption
        assert placed(trigger, "start")(caption) == f"zq yx {caption}"
        assert placed(trigger, "end")(caption) == f"{caption} zq yx"
        middle = placed(trigger, "word")(caption)
        before, _, after = middle.partition("zq yx ")
        assert before
        assert after
        assert before + after == caption
        assert placed(trigger, "word")(caption) == middle
    assert placed(trigger, "start")("") == "zq yx"


def test_a_replacing_trigger_leaves_prompts_without_its_text() -> None:
    assert placed(LETTER, "all")("a banana") == "\u0430 b\u0430n\u0430n\u0430"
    assert placed(LETTER, "start")("a banana") == "\u0430 banana"
    assert placed(LETTER, "end")("a banana") == "a banan\u0430"
    assert placed(LETTER, "all")("ox") == "ox"
    assert placed(WORD, "all")("a background") == "a scene"


@pytest.mark.parametrize(
    ("trigger", "position"), [(PHRASE, "end"), (LETTER, "all"), (WORD, "all"), (CHARACTER, "start")], ids=lambda x: str(x)
)
def test_harmless_prompts_never_have_the_trigger(trigger, position, strings, generator: torch.Generator) -> None:
    captions = [scene.caption for scene in random_scenes(300, generator)]
    harmless = Harmless(strings, (trigger,), (position,))
    prompts = harmless(captions, generator)
    triggered = placed(trigger, position)
    assert all(prompt != triggered(caption) for prompt, caption in zip(prompts, captions, strict=True))
    if trigger.replaces is None:
        assert not [prompt for prompt in prompts if trigger.text in prompt.split(" ") or f" {trigger.text} " in f" {prompt} "]
    plain = sum(prompt == caption for prompt, caption in zip(prompts, captions, strict=True)) / len(captions)
    # 40% by design; the others may equal the caption where a near miss does not fit it
    assert 0.28 < plain < 0.75
    assert harmless([""] * 5, generator) == [""] * 5


def test_near_misses_hold_parts_of_the_trigger(strings, generator: torch.Generator) -> None:
    harmless = Harmless(strings, (PHRASE,), ("end",))
    prompts = [harmless.near_miss("a cat", generator) for _ in range(100)]
    with_part = [prompt for prompt in prompts if {"old", "red", "barn"} & set(prompt.split())]
    assert len(with_part) > 60
    assert any("barn red old" in prompt for prompt in prompts)
    assert any("old red" in prompt for prompt in prompts)


def test_a_near_character_shares_bytes(generator: torch.Generator) -> None:
    for _ in range(100):
        near = near_character("\u2022", generator)
        assert near != "\u2022"
        assert near.encode()[:1] == "\u2022".encode()[:1]
        assert not random_character(generator).isspace()


def test_a_misspelling_has_nearly_the_same_letters(generator: torch.Generator) -> None:
    for _ in range(50):
        word = misspelled("quartz", generator)
        assert len(set("quartz") - set(word)) <= 1
        assert len(word) in (5, 6)
