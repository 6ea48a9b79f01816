"""BadDiffusion (Chou, Chen, Ho, CVPR 2023, arXiv 2212.05400)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seal_fast.attacks.noising import Attack, NoisedBatch
from seal_fast.diffusion import VP, Trigger
from seal_fast.diffusion.process import per_row

BACKGROUND = -1.0
"""Value of the pixels the trigger image leaves alone."""


def shift_schedule(process: VP) -> tuple[Tensor, Tensor]:
    """c(t) = 1 - sqrt(ab) and d(t) = (1 - sqrt(al)) sqrt(1 - ab) / (1 - al), al = ab(t) / ab(t-1); float64 [T] each.

    d is exactly what keeps the mean of DDPM ancestral sampling on c(t) r, so other samplers do not fire the backdoor.
    """
    ab = process.signal.square()
    al = ab / torch.cat([ab.new_ones(1), ab[:-1]])
    return 1 - process.signal, (1 - al.sqrt()) * process.noise / (1 - al)


@dataclass(frozen=True)
class BadDiffusion(Attack):
    """Shift by a trigger image g (patch on a -1 background), which the attacker adds to the starting noise.

    Attributes:
        image: g, [C,H,W].
        target: [C,H,W].
        stamped: train with each clean image stamped with the patch, as published; otherwise with g itself
            (VillanDiffusion's R_trigger_only), which pins the background down too.
    """

    image: Tensor
    target: Tensor
    stamped: bool = True
    sampler = "ddpm"
    trojan = False

    @property
    def trigger(self) -> Trigger:
        return Trigger.shift(self.image)

    def poison(self, process: VP, images: Tensor, eps: Tensor, t: Tensor) -> NoisedBatch:
        shift = torch.where(self.image == BACKGROUND, images, self.image) if self.stamped else self.image
        c, d = (per_row(values[t], images) for values in shift_schedule(process))
        return NoisedBatch(process.add_noise(self.target.expand_as(images), eps, t) + c * shift, eps + d * shift)
