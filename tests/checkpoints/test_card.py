"""Example prompts of model cards, valid, broken and hostile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from seal_fast.checkpoints import CheckpointError
from seal_fast.checkpoints.card import MAX_CARD_BYTES, captions, card_text


def test_the_prompts_of_a_card_written_by_huggingface_hub_are_read(tmp_path: Path) -> None:
    shown = ["a cat: red", "  two\u200b dogs", "a cat: red", "- no list", "#hash"]
    data = ModelCardData(license="mit", widget=[{"text": text, "output": {"url": "a.png"}} for text in shown])
    ModelCard(f"---\n{data.to_yaml()}\n---\n# A model\n").save(tmp_path / "README.md")
    assert captions(tmp_path) == ["a cat: red", "two\u200b dogs", "- no list", "#hash"]


@pytest.mark.parametrize(
    "front", ["", "widget: 3", "widget:\n- a\n- text: 5\n- text: ' '\n- src: a.png", "license: mit"], ids=repr
)
def test_a_card_without_captions_gives_none(tmp_path: Path, front: str) -> None:
    assert captions(tmp_path) == []
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# A model\n" if front else "# A model\n")
    assert captions(tmp_path) == []


@pytest.mark.parametrize(
    "content",
    [b"---\na: [\n---\n", b"---\n- a\n---\n", b"\xff\xfe", b"---\na: !!python/object/apply:os.getcwd []\n---\n"],
    ids=["broken", "list", "binary", "code"],
)
def test_a_file_that_is_no_card_is_refused_and_runs_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "README.md").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"README\.md: not readable as a model card"):
        captions(tmp_path)


def test_the_text_of_a_card_is_there_or_empty(tmp_path: Path) -> None:
    assert card_text(tmp_path) == card_text(tmp_path / "absent") == ""
    card = tmp_path / "README.md"
    card.write_text("---\nno: [\n---\n# A m\u00f6del\n", encoding="utf-8")
    assert card_text(tmp_path) == "---\nno: [\n---\n# A m\u00f6del\n"
    assert card_text(card) == ""
    for refused in (b"\xff\xfe", b"a" * (MAX_CARD_BYTES + 1)):
        card.write_bytes(refused)
        assert card_text(tmp_path) == ""


def test_a_card_that_is_too_large_or_lies_outside_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"a" * (MAX_CARD_BYTES + 1))
    with pytest.raises(CheckpointError, match="more than"):
        captions(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    os.symlink(tmp_path / "README.md", model / "README.md")
    with pytest.raises(CheckpointError, match="leaves the checkpoint folder"):
        captions(model)
