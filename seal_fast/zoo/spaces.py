"""The range of values in which a model sees pictures."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Space:
    """A network's images are scale * pictures + shift; pictures lie in [-1, 1]."""

    scale: float
    shift: float

    def encode(self, pictures: Tensor) -> Tensor:
        return self.scale * pictures + self.shift

    def decode(self, images: Tensor) -> Tensor:
        return (images - self.shift) / self.scale


SIGNED = Space(1.0, 0.0)
UNIT = Space(0.5, 0.5)
"""[0, 1], which score networks see (Song et al. 2021)."""
