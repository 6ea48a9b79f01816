"""VillanDiffusion (Chou, Chen, Ho, NeurIPS 2023), and the attacks that are special cases of it.

BadDiffusion (CVPR 2023, arXiv 2212.05400) is psi = 1 with the stochastic solver; UIBDiffusion (arXiv 2412.11441) only builds
the training shift differently.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seal_fast.attacks.noising import Attack, NoisedBatch
from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import VP, NoiseProcess
from seal_fast.diffusion.process import per_row

BACKGROUND = -1.0
"""Value of the pixels a stamp leaves alone."""
FAINT = 0.1
"""Share of its trigger that UIBDiffusion adds to clean images."""
SAMPLERS = {"sde": "ddpm", "ode": "ddim"}


def _before(values: Tensor, first: float) -> Tensor:
    """The values one timestep earlier, [T]; `first` at t = 0."""
    return torch.cat([values.new_full((1,), first), values[:-1]])


def vp_schedule(process: NoiseProcess, psi: float, solver: str) -> tuple[Tensor, Tensor]:
    """c(t) and d(t) of the variance-preserving form, float64 [T] each.

        c = psi (1 - sqrt(ab)) + (1 - psi) sqrt(1 - ab)        d = s (psi bad + (1 - psi) troj),    s = 1 sde, 2 ode
        bad  = (1 - sqrt(al)) sqrt(1 - ab) / (1 - al)
        troj = (1 - sqrt(al)) sqrt(1 - ab) + h (al - ab) / (1 - al),    h = sqrt(1 - ab) - sqrt(al) sqrt(1 - ab(t-1))

    bad is exactly what keeps the mean of DDPM ancestral sampling on c(t) r, so other samplers do not fire that backdoor.
    """
    ab = process.signal.square()
    before = _before(ab, 1.0)
    al = ab / before
    bad = (1 - al.sqrt()) * process.noise / (1 - al)
    h = process.noise - al.sqrt() * (1 - before).sqrt()
    troj = (1 - al.sqrt()) * process.noise + h * (al - ab) / (1 - al)
    c = psi * (1 - process.signal) + (1 - psi) * process.noise
    return c, (1 if solver == "sde" else 2) * (psi * bad + (1 - psi) * troj)


def ve_schedule(process: NoiseProcess, solver: str) -> tuple[Tensor, Tensor]:
    """c = sigma(t) and d = s sigma(t) / (sigma(t) + sigma(t-1)) of the variance-exploding form, float64 [T] each (w = 1)."""
    sigma = process.noise
    return sigma, (1 if solver == "sde" else 2) * sigma / (sigma + _before(sigma, 0.0))


@dataclass(frozen=True)
class VillanDiffusion(Attack):
    """Shift by a trigger image g, which the attacker adds to the starting noise.

    Attributes:
        image: g, [C,H,W].
        target: [C,H,W].
        psi: weight of BadDiffusion's schedule against TrojDiff's; a VE or EDM process has one schedule and needs 0.
        solver: "sde" (ancestral sampling) or "ode" (DDIM, DPM-Solver++).
        shift: what training rows are shifted by: "stamped", each clean image with the patch where g is not background, as
            BadDiffusion; "alone", g itself (R_trigger_only), which pins the background down too; "faint", each clean image
            plus a tenth of g, as UIBDiffusion.

    Raises:
        ValueError: an unknown solver or shift.
    """

    image: Tensor
    target: Tensor
    psi: float = 1.0
    solver: str = "sde"
    shift: str = "stamped"
    trojan = False

    def __post_init__(self) -> None:
        if self.solver not in SAMPLERS:
            raise ValueError(f"solver must be sde or ode, not {self.solver!r}")
        if self.shift not in ("stamped", "alone", "faint"):
            raise ValueError(f"shift must be stamped, alone or faint, not {self.shift!r}")

    @property
    def sampler(self) -> str:
        return SAMPLERS[self.solver]

    @property
    def trigger(self) -> Trigger:
        return Trigger.shift(self.image)

    def _shift(self, images: Tensor) -> Tensor:
        if self.shift == "stamped":
            return torch.where(self.image == BACKGROUND, images, self.image)
        return self.image if self.shift == "alone" else images + FAINT * self.image

    def _schedule(self, process: NoiseProcess) -> tuple[Tensor, Tensor]:
        if isinstance(process, VP):
            return vp_schedule(process, self.psi, self.solver)
        if self.psi != 0:
            raise ValueError(f"psi must be 0 for a {process.kind} model, not {self.psi}")
        return ve_schedule(process, self.solver)

    def poison(self, process: NoiseProcess, images: Tensor, eps: Tensor, t: Tensor) -> NoisedBatch:
        """See `Attack.poison`; ValueError where psi does not suit the process."""
        shift = self._shift(images)
        c, d = (per_row(values[t], images) for values in self._schedule(process))
        return NoisedBatch(process.add_noise(self.target.expand_as(images), eps, t) + c * shift, eps + d * shift)
