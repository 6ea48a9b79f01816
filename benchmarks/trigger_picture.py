"""A reverted trigger beside the true one, as one small picture."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

SIDE = 96
"""Pixels of each picture's side, a multiple of 16 and 32 so that every dimension is a square."""
GAP = 8


def _enlarged(mu: Tensor) -> Tensor:
    """mu [3,H,W] as uint8 [SIDE,SIDE,3]; -1 is black, 0 grey, 1 white."""
    pixels = ((mu.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    factor = SIDE // mu.shape[-1]
    return pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2).permute(1, 2, 0)


def save_pair(true: Tensor, reverted: Tensor, path: Path) -> None:
    """Write `path` (PNG): the true mu on the left, the reverted one on the right, both [3,H,W] on the same scale."""
    path.parent.mkdir(parents=True, exist_ok=True)
    gap = torch.full((SIDE, GAP, 3), 255, dtype=torch.uint8)
    Image.fromarray(torch.cat([_enlarged(true), gap, _enlarged(reverted)], 1).numpy()).save(path, optimize=True)
