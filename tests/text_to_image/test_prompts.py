"""Tokens as a reader sees them, against the bytes of the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from seal_fast.text_to_image.prompts import content_ids, token_text
from tests.tiny_pipeline import tiny_pipeline


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return tiny_pipeline(tmp_path).tokenizer


def texts(tokenizer: Any, text: str) -> list[str]:
    return [token_text(tokenizer, number) for number in content_ids(tokenizer, text)]


def test_words_are_words_and_what_cannot_be_printed_is_escaped(tokenizer: Any) -> None:
    assert texts(tokenizer, "red cat") == ["red", "cat"]
    assert texts(tokenizer, "\x7f") == ["\\x7f"]


def test_parts_of_a_character_are_its_bytes(tokenizer: Any, generator: torch.Generator) -> None:
    # letters and symbols, which the tokenizer's normalisation leaves as they are
    numbers = torch.randint(0x2190, 0x2300, (20,), generator=generator).tolist()
    for character in ["\u200b", "\U0001f600", *map(chr, numbers)]:
        shown = texts(tokenizer, character)
        assert all(part.startswith("<") and part.endswith(">") for part in shown)
        assert bytes.fromhex(" ".join(part[1:-1] for part in shown)) == character.encode()
