"""The data that a network is trained on, made from images: their pixels in some range, or latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Space(Protocol):
    """Maps images in [-1, 1], [N,3,f H,f W], to the clean data of a network, [N,C,H,W], and back."""

    @property
    def factor(self) -> int:
        """f: side of the images divided by side of the data."""

    @property
    def bounded(self) -> bool:
        """Whether the data certainly lies in [-1, 1]."""

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, data: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Pixels:
    """The data is scale * images + shift."""

    scale: float
    shift: float
    factor = 1
    bounded = True

    def encode(self, images: Tensor) -> Tensor:
        return self.scale * images + self.shift

    def decode(self, data: Tensor) -> Tensor:
        return (data - self.shift) / self.scale


SIGNED = Pixels(1.0, 0.0)
UNIT = Pixels(0.5, 0.5)
"""Pixels in [0, 1], the data of score networks (Song et al. 2021)."""
