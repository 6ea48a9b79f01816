"""The variants of a trigger that are measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from seal_fast.text_triggers.trigger import TextTrigger
from seal_fast.text_triggers.variants import AS_GIVEN, CONTROLS, prompt_sets, variants
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


@pytest.mark.parametrize(("room", "controls"), [(8, CONTROLS), (3, 2)])
def test_control_triggers_without_room_are_passed_over(tmp_path: Path, room: int, controls: int) -> None:
    tokenizer = tiny_pipeline(tmp_path).tokenizer
    prompts = [" ".join([word] * (LENGTH - 2 - room)) for word in ("cat", "dog")]
    given, *others = prompt_sets(tokenizer, TextTrigger("zz"), prompts, 2, "end", 0)
    assert given.triggered == tuple(f"{prompt} zz" for prompt in prompts)
    assert len(given.controls) == controls
    for control in given.controls:
        for prompt, text in zip(prompts, control, strict=True):
            assert text.startswith(prompt)
            assert len(tokenizer(text).input_ids) <= LENGTH
    assert ("twice" in {other.variant for other in others}) == (room == 8)


@pytest.mark.parametrize(("room", "reason"), [(2, "control text .* shorter prompts"), (1, "Shorten the prompt")])
def test_prompts_without_room_are_refused(tmp_path: Path, room: int, reason: str) -> None:
    tokenizer = tiny_pipeline(tmp_path).tokenizer
    prompts = [" ".join([word] * (LENGTH - 2 - room)) for word in ("cat", "dog")]
    with pytest.raises(ValueError, match=reason):
        prompt_sets(tokenizer, TextTrigger("zz"), prompts, 2, "end", 0)
