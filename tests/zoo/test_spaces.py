"""Encoding images as the data of a network, and decoding it."""

from __future__ import annotations

import pytest
import torch

from seal_fast.zoo.spaces import SIGNED, UNIT, Space


@pytest.mark.parametrize(("space", "ends"), [(SIGNED, [-1.0, 0.0, 1.0]), (UNIT, [0.0, 0.5, 1.0])], ids=["signed", "unit"])
def test_images_are_encoded_and_decoded(space: Space, ends: list[float], generator: torch.Generator) -> None:
    assert space.encode(torch.tensor([-1.0, 0.0, 1.0])).tolist() == ends
    images = 2 * torch.rand(3, 3, 4, 6, generator=generator) - 1
    torch.testing.assert_close(space.decode(space.encode(images)), images)
