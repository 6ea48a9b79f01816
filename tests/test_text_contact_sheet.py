"""The contact sheet of zoo-text/, with images made by hand."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.text_contact_sheet import PROMPTS, Row, contact_sheet


def plain(red: float, green: float, blue: float) -> torch.Tensor:
    return torch.tensor([red, green, blue]).reshape(1, 3, 1, 1).expand(PROMPTS, 3, 8, 8)


def test_rows_keep_their_order_and_triggered_images_stand_on_the_right() -> None:
    red, green, blue = plain(1, -1, -1), plain(-1, 1, -1), plain(-1, -1, 1)
    sheet = contact_sheet([Row("first", red, blue), Row("$second$\n'a'", red, green)])
    pixels = np.asarray(sheet.convert("RGB")).astype(int)

    def places(colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the pixels of nearly this colour; few colours are no exact ones."""
        return np.nonzero(np.abs(pixels - colour).max(-1) < 12)

    reds, greens, blues = places((255, 0, 0)), places((0, 255, 0)), places((0, 0, 255))
    assert len(reds[0]) > 1.8 * len(greens[0]) > 0
    assert len(greens[0]) > 0.8 * len(blues[0]) > 0
    assert reds[1].max() < min(greens[1].min(), blues[1].min())
    assert blues[0].max() < greens[0].min()
    assert sheet.mode == "P"
