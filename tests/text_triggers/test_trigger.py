"""One text trigger: how it is written, which prompts it fits, and what it makes of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seal_fast import TextTrigger
from seal_fast.text_triggers.trigger import as_triggers

HOMOGLYPH = TextTrigger("ö", replaces="o")


@pytest.mark.parametrize(
    ("written", "trigger", "name"),
    [
        (r"\u200b", TextTrigger("\u200b"), "\u200b"),
        ("I like this photo.", TextTrigger("I like this photo."), "I like this photo."),
        (r"o=>\U00010486", TextTrigger("\U00010486", replaces="o"), "o => \U00010486"),
        (r"\xf4\n", TextTrigger(r"ô\n"), r"ô\n"),
    ],
)
def test_as_written_on_the_command_line(written: str, trigger: TextTrigger, name: str) -> None:
    assert TextTrigger.parse(written) == trigger
    assert trigger.name == name


@pytest.mark.parametrize("written", ["", "=>", "a=>", "=>a", r"\U00ffffff", r"\ud800", r"a=>\udfff", r"\udc00=>a"])
def test_empty_texts_and_no_characters_are_refused(written: str) -> None:
    with pytest.raises(ValueError, match=r"must not be empty|chr\(\)|surrogate"):
        TextTrigger.parse(written)


def test_a_replacement_fits_the_prompts_with_its_text() -> None:
    assert TextTrigger("cat").fitting(["a dog", ""]) == ["a dog", ""]
    assert HOMOGLYPH.fitting(["a dog", "a cat", "zoo"]) == ["a dog", "zoo"]
    assert not HOMOGLYPH.fits("a cat")
    with pytest.raises(ValueError, match="no prompt contains"):
        HOMOGLYPH.fitting(["a cat"])


@given(st.lists(st.sampled_from(["a", "dog", "zoo"]), min_size=1, max_size=4), st.integers(0, 2**31))
def test_inserted_text_stands_alone_between_the_words(words: list[str], seed: int) -> None:
    prompt = " ".join(words)
    inserted = {}
    for position in ("start", "end", "word"):
        (place,) = TextTrigger("two words").places(prompt, position, torch.Generator().manual_seed(seed))
        inserted[position] = TextTrigger("two words").insert(prompt, place)
    assert inserted["start"] == f"two words {prompt}"
    assert inserted["end"] == f"{prompt} two words"
    between = [" ".join([*words[:n], "two words", *words[n:]]) for n in range(1, len(words))]
    assert inserted["word"] in (between or [inserted["start"]])


@given(st.text("abo ", min_size=1, max_size=8).filter(lambda prompt: "o" in prompt), st.integers(0, 2**31))
def test_a_replacement_leaves_the_other_characters(prompt: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    (first,), (last,), (some,), every = (HOMOGLYPH.places(prompt, at, generator) for at in ("start", "end", "word", "all"))
    assert every == [place for place, letter in enumerate(prompt) if letter == "o"]
    assert (first, last) == (every[0], every[-1])
    assert some in every
    assert HOMOGLYPH.insert(prompt, some) == prompt[:some] + "ö" + prompt[some + 1 :]


def test_places_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="is inserted"):
        TextTrigger("cat").places("a dog", "all", torch.Generator())
    with pytest.raises(ValueError, match="does not contain 'o'"):
        HOMOGLYPH.places("a cat", "start", torch.Generator())


def test_a_plain_text_is_inserted() -> None:
    assert as_triggers(["cat", HOMOGLYPH]) == (TextTrigger("cat"), HOMOGLYPH)
    for wrong in ("cat", [], HOMOGLYPH):
        with pytest.raises(ValueError, match="must be a list"):
            as_triggers(wrong)
    with pytest.raises(ValueError, match="must not be empty"):
        as_triggers([""])


def test_a_text_replaced_by_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="two different texts"):
        TextTrigger.parse("a=>a")
