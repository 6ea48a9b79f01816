"""Recognise the scene in an image: its attributes are those of the nearest rendering of all scenes."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from seal_fast.text_triggers.effect_detectors import ColourlessDetector
from seal_fast.zoo.captioned import ATTRIBUTES, SCENES, STYLES, Scene, render

POOL = 2
"""Pixels per side that are averaged before images are compared. This reduces sampling noise and preserves edges."""


def _features(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, POOL).flatten(1)


@cache
def _renderings(colourless: bool) -> Tensor:
    images = torch.cat([render(SCENES[i : i + 200]) for i in range(0, len(SCENES), 200)])
    return _features(images.mean(dim=1, keepdim=True).expand_as(images) if colourless else images)


def is_colourless(images: Tensor) -> Tensor:
    """Whether each of the images [N,3,H,W] in [-1, 1] has no colour, bool [N]."""
    images = images / 2 + 0.5
    return ColourlessDetector()(images, images)


def distance_to_scenes(images: Tensor, references: Tensor | None = None) -> Tensor:
    """Distance of each of the images [N,3,64,64] in [-1, 1] to its reference, or to the nearest scene in colour, [N]."""
    if references is not None:
        return (_features(images) - _features(references)).norm(dim=1)
    return torch.cdist(_features(images), _renderings(False)).amin(dim=1)


def recognise_scenes(images: Tensor) -> list[Scene]:
    """The scene in each of the images [N,3,64,64] in [-1, 1]; `colour` is meaningless for a style without colour."""
    grey = is_colourless(images)
    nearest = torch.empty(len(images), dtype=torch.long)
    for colourless in (False, True):
        chosen = grey == colourless
        if chosen.any():
            nearest[chosen] = torch.cdist(_features(images[chosen]), _renderings(colourless)).argmin(dim=1)
    return [
        Scene(s.size, s.colour, s.shape, s.place, s.texture, s.background, STYLES[int(g)])
        for s, g in ((SCENES[i], g) for i, g in zip(nearest.tolist(), grey.tolist(), strict=True))
    ]


def attributes_right(images: Tensor, scenes: list[Scene]) -> Tensor:
    """Whether each image shows each attribute of its scene, bool [N, len(ATTRIBUTES)]."""
    recognised = recognise_scenes(images)
    return torch.tensor(
        [[getattr(a, name) == getattr(b, name) for name in ATTRIBUTES] for a, b in zip(recognised, scenes, strict=True)]
    )
