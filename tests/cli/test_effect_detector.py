"""Effect detectors on the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seal_fast.cli.effect_detector import parse_detector
from seal_fast.text_triggers.effect_detectors import ColourlessDetector, PatchDetector


def test_detectors_without_a_file() -> None:
    assert parse_detector("change") is None
    assert parse_detector("colourless") == ColourlessDetector()


@pytest.mark.parametrize(("suffix", "place"), [("", (0, 0)), ("@7,11", (7, 11))])
def test_a_patch_keeps_its_pixels_and_its_place(tmp_path: Path, suffix: str, place: tuple[int, int]) -> None:
    pixels = np.random.default_rng().integers(0, 256, (3, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p@tch.png")
    detector = parse_detector(f"patch={tmp_path}/p@tch.png{suffix}")
    assert isinstance(detector, PatchDetector)
    assert (detector.top, detector.left) == place
    assert detector.patch.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy().tolist() == pixels.tolist()


@pytest.mark.parametrize("wrong", ["", "grey", "patch=", "patch={}/absent.png", "patch={}/text.png"])
def test_anything_else_is_refused(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"an effect detector is|no readable image"):
        parse_detector(wrong.format(tmp_path))
