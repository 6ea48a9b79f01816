"""Prompts: given, from a model card, shipped; and files of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import metadata_save

from seal_fast.checkpoints import CheckpointError
from seal_fast.workflows.prompts import FEWEST_CAPTIONS, choose_prompts, clean_prompts, read_lines, read_prompts

PROMPTS = ["a red cat", "two cats", "on a mat", "a red mat"]


def test_prompts_are_split_and_those_shipped_differ(tmp_path: Path) -> None:
    training, held_out, source = choose_prompts(None, None)
    assert source == "shipped"
    assert len(set(training)) == len(set(held_out)) == 200
    assert not set(training) & set(held_out)
    assert choose_prompts(PROMPTS, tmp_path) == (PROMPTS[::2], PROMPTS[1::2], "given")


def test_a_card_with_captions_enough_gives_the_prompts(tmp_path: Path) -> None:
    shown = [f"scene {number}" for number in range(FEWEST_CAPTIONS)]
    metadata_save(tmp_path / "README.md", {"widget": [{"text": text} for text in shown]})
    assert choose_prompts(None, tmp_path) == (shown[::2], shown[1::2], "model card")
    metadata_save(tmp_path / "README.md", {"widget": [{"text": text} for text in [*shown[1:], shown[1]]]})
    assert choose_prompts(None, tmp_path)[2] == "shipped"


def test_a_prompt_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "few").write_text("a\na\nb\nc\n")
    with pytest.raises(CheckpointError, match="fewer than four"):
        read_prompts(tmp_path / "few")
    (tmp_path / "odd").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="UTF-8"):
        read_prompts(tmp_path / "odd")


def test_a_prompt_file_that_is_too_long_is_refused_and_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seal_fast.workflows.prompts.MAX_PROMPT_BYTES", 8)
    (tmp_path / "fits").write_text("a cat\na\n")
    assert read_lines(tmp_path / "fits") == ["a cat", "a"]
    (tmp_path / "long").write_text("a cat\na\nb")
    with pytest.raises(CheckpointError, match="more than 8 bytes"):
        read_lines(tmp_path / "long")


def test_given_clean_prompts_keep_their_order(tmp_path: Path) -> None:
    for some in (PROMPTS, PROMPTS[:3]):
        assert clean_prompts(some, tmp_path) == (some, [f"{len(some)} clean prompts: given"])
