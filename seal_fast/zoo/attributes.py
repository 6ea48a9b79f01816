"""Read a scene back from an image: the nearest of all renderings. Validated on renderings in tests/zoo."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from seal_fast.text_triggers.effect_detectors import ColourlessDetector
from seal_fast.zoo.captioned import ATTRIBUTES, SCENES, STYLES, Scene, render

POOL = 2
"""Pixels per side that are averaged before comparing: sampling noise goes, edges stay."""


def _features(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, POOL).flatten(1)


@cache
def _renderings(colourless: bool) -> Tensor:
    images = torch.cat([render(SCENES[i : i + 200]) for i in range(0, len(SCENES), 200)])
    return _features(images.mean(dim=1, keepdim=True).expand_as(images) if colourless else images)


def is_colourless(images: Tensor) -> Tensor:
    """bool [N] of images [N,3,H,W] in [-1, 1]."""
    images = images / 2 + 0.5
    return ColourlessDetector()(images, images)


def read_scenes(images: Tensor) -> list[Scene]:
    """The scene in each of the images [N,3,64,64] in [-1, 1]; `colour` means nothing where the style has none."""
    grey = is_colourless(images)
    found = torch.empty(len(images), dtype=torch.long)
    for colourless in (False, True):
        rows = grey == colourless
        if rows.any():
            found[rows] = torch.cdist(_features(images[rows]), _renderings(colourless)).argmin(dim=1)
    return [
        Scene(s.size, s.colour, s.shape, s.place, s.texture, s.background, STYLES[int(g)])
        for s, g in ((SCENES[i], g) for i, g in zip(found.tolist(), grey.tolist(), strict=True))
    ]


def attributes_right(images: Tensor, scenes: list[Scene]) -> Tensor:
    """Whether each attribute of each scene is what its image shows, bool [N, len(ATTRIBUTES)]."""
    read = read_scenes(images)
    return torch.tensor(
        [[getattr(a, name) == getattr(b, name) for name in ATTRIBUTES] for a, b in zip(read, scenes, strict=True)]
    )
