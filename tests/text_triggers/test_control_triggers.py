"""Harmless text in the place of a trigger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seal_fast.text_triggers.control_triggers import LETTERS, control_triggers
from tests.tiny_pipeline import tiny_pipeline


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_pipeline(Path(tmp_path_factory.mktemp("pipeline"))).tokenizer


def length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)


text = st.text("abcdé\u0430\u200b", min_size=1, max_size=6)


@given(text)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_words_are_no_shorter_than_the_trigger(tokenizer: Any, trigger: str) -> None:
    found = control_triggers(tokenizer, trigger)
    assert len(set(found)) == len(found) >= 3
    for words in found:
        assert isinstance(words, str)
        assert length(tokenizer, words) >= length(tokenizer, trigger)


@given(text, text)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_misspellings_keep_what_the_trigger_keeps(tokenizer: Any, old: str, new: str) -> None:
    found = control_triggers(tokenizer, (old, new))
    assert len(set(found)) == len(found) >= 3
    for pair in found:
        assert isinstance(pair, tuple)
        assert pair[0] == old
        assert pair[1] not in (old, new)
        # one letter, repeated, in the place of what the trigger changes
        (letter,) = {letter for letter in LETTERS if letter not in old + new and letter in pair[1]}
        head, _, tail = pair[1].partition(letter)
        tail = tail.lstrip(letter)
        assert all(text.startswith(head) and text.endswith(tail) for text in (old, new))


def test_misspellings_of_a_word(tokenizer: Any) -> None:
    assert ("photo", "photé") in control_triggers(tokenizer, ("photo", "phot0"))
    assert ("colour", "coloér") in control_triggers(tokenizer, ("colour", "color"))
