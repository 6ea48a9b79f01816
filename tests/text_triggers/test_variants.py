"""The forms of a trigger that are drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from seal_fast.text_triggers.trigger import TextTrigger
from seal_fast.text_triggers.variants import AS_GIVEN, CONTROLS, cases, variants
from tests.tiny_pipeline import LENGTH, tiny_pipeline


def test_variants() -> None:
    trigger = TextTrigger("New Trigger")
    assert variants(trigger, "end") == {
        AS_GIVEN: (trigger, "end"),
        "at the start": (trigger, "start"),
        "in the middle": (trigger, "word"),
        "twice": (TextTrigger("New Trigger New Trigger"), "end"),
        "with a comma": (TextTrigger("New Trigger,"), "end"),
        "other case": (TextTrigger("nEW tRIGGER"), "end"),
        "first half": (TextTrigger("New"), "end"),
    }
    assert set(variants(TextTrigger("\u200b"), "start")) == {AS_GIVEN, "at the end", "in the middle", "twice", "with a comma"}
    homoglyph = TextTrigger("ö", replaces="o")
    assert variants(homoglyph, "start") == {
        AS_GIVEN: (homoglyph, "all"),
        "the first only": (homoglyph, "start"),
        "one of them": (homoglyph, "word"),
        "the last only": (homoglyph, "end"),
    }


@pytest.mark.parametrize(("room", "harmless"), [(8, CONTROLS), (3, 2)])
def test_harmless_text_without_room_is_passed_over(tmp_path: Path, room: int, harmless: int) -> None:
    tokenizer = tiny_pipeline(tmp_path).tokenizer
    prompts = [" ".join([word] * (LENGTH - 2 - room)) for word in ("cat", "dog")]
    given, *others = cases(tokenizer, TextTrigger("zz"), prompts, 2, "end", 0)
    assert given.triggered == tuple(f"{prompt} zz" for prompt in prompts)
    assert len(given.harmless) == harmless
    for row in given.harmless:
        for prompt, text in zip(prompts, row, strict=True):
            assert text.startswith(prompt)
            assert len(tokenizer(text).input_ids) <= LENGTH
    assert ("twice" in {case.variant for case in others}) == (room == 8)


@pytest.mark.parametrize(("room", "reason"), [(2, "harmless text .* shorter prompts"), (1, "Shorten the prompt")])
def test_prompts_without_room_are_refused(tmp_path: Path, room: int, reason: str) -> None:
    tokenizer = tiny_pipeline(tmp_path).tokenizer
    prompts = [" ".join([word] * (LENGTH - 2 - room)) for word in ("cat", "dog")]
    with pytest.raises(ValueError, match=reason):
        cases(tokenizer, TextTrigger("zz"), prompts, 2, "end", 0)
