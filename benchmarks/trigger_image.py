"""A recovered trigger beside the true one, as one small image."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

SIDE = 96
"""Pixels of each image's side, as near as whole squares per dimension allow."""
GAP = 8


def _enlarged(mu: Tensor) -> Tensor:
    """mu [3,H,W] as uint8, about SIDE high; -1 is black, 0 grey, 1 white."""
    pixels = ((mu.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    factor = round(SIDE / mu.shape[-1])
    return pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2).permute(1, 2, 0)


def save_pair(true: Tensor, reverted: Tensor, path: Path) -> None:
    """Write `path` (PNG): the true mu on the left, the recovered one on the right, both [3,H,W] on the same scale."""
    path.parent.mkdir(parents=True, exist_ok=True)
    left, right = _enlarged(true), _enlarged(reverted)
    gap = torch.full((len(left), GAP, 3), 255, dtype=torch.uint8)
    Image.fromarray(torch.cat([left, gap, right], 1).numpy()).save(path, optimize=True)
