"""What a model sees of an image: its pixels, in whatever range, or something made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Space(Protocol):
    """Between images in [-1, 1], [N,3,f H,f W], and a network's images of them, [N,C,H,W]."""

    @property
    def factor(self) -> int:
        """f: how many times larger images are."""

    @property
    def bounded(self) -> bool:
        """Whether the images lie in [-1, 1], as the images do."""

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Pixels:
    """Images are scale * images + shift."""

    scale: float
    shift: float
    factor = 1
    bounded = True

    def encode(self, images: Tensor) -> Tensor:
        return self.scale * images + self.shift

    def decode(self, images: Tensor) -> Tensor:
        return (images - self.shift) / self.scale


SIGNED = Pixels(1.0, 0.0)
UNIT = Pixels(0.5, 0.5)
"""[0, 1], which score networks see (Song et al. 2021)."""
