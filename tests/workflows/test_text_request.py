"""What the command line says of effect detectors and prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import metadata_save
from PIL import Image

from seal_fast.checkpoints import CheckpointError
from seal_fast.text_triggers.effect_detectors import ColourlessDetector, PatchDetector
from seal_fast.workflows.text_request import FEWEST_CAPTIONS, choose_prompts, parse_detector, read_prompts

PROMPTS = ["a red cat", "two cats", "on a mat", "a red mat"]


def test_effect_detectors_on_the_command_line(tmp_path: Path) -> None:
    pixels = np.random.default_rng().integers(0, 256, (3, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p@tch.png")
    assert parse_detector("change") is None
    assert parse_detector("colourless") == ColourlessDetector()
    for text, place in ((f"patch={tmp_path}/p@tch.png", (0, 0)), (f"patch={tmp_path}/p@tch.png@7,11", (7, 11))):
        detector = parse_detector(text)
        assert isinstance(detector, PatchDetector)
        assert (detector.top, detector.left) == place
        assert detector.patch.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy().tolist() == pixels.tolist()
    (tmp_path / "text.png").write_text("no image")
    for wrong in ("", "grey", "patch=", f"patch={tmp_path}/absent.png", f"patch={tmp_path}/text.png"):
        with pytest.raises(ValueError, match=r"an effect detector is|no image"):
            parse_detector(wrong)


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
