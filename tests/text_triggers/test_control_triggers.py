"""Control triggers in the place of a trigger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from seal_fast.text_triggers.control_triggers import LETTERS, control_triggers
from seal_fast.text_triggers.trigger import TextTrigger
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
    found = control_triggers(tokenizer, TextTrigger(trigger))
    assert len(set(found)) == len(found) >= 3
    for control in found:
        assert control.replaces is None
        assert length(tokenizer, control.text) >= length(tokenizer, trigger)


@given(text, text)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_misspellings_keep_what_the_trigger_keeps(tokenizer: Any, old: str, new: str) -> None:
    assume(old != new)
    found = control_triggers(tokenizer, TextTrigger(new, replaces=old))
    assert len(set(found)) == len(found) >= 3
    for control in found:
        assert control.replaces == old
        assert control.text not in (old, new)
        # one letter, repeated, in the place of what the trigger changes
        (letter,) = {letter for letter in LETTERS if letter not in old + new and letter in control.text}
        head, _, tail = control.text.partition(letter)
        tail = tail.lstrip(letter)
        assert all(text.startswith(head) and text.endswith(tail) for text in (old, new))


def test_misspellings_of_a_word(tokenizer: Any) -> None:
    assert TextTrigger("photé", replaces="photo") in control_triggers(tokenizer, TextTrigger("phot0", replaces="photo"))
    assert TextTrigger("coloér", replaces="colour") in control_triggers(tokenizer, TextTrigger("color", replaces="colour"))
