"""VillanDiffusion (Chou, Chen, Ho, NeurIPS 2023) and its special cases.

BadDiffusion (CVPR 2023, arXiv 2212.05400) is psi = 1 with the stochastic solver. UIBDiffusion (arXiv 2412.11441) differs in the
training shift only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seal_fast.attacks.noising import Attack, NoisedBatch, one_step_earlier
from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import VP, NoiseProcess
from seal_fast.diffusion.process import per_sample

BACKGROUND = -1.0
"""Value of the trigger image's pixels that stamping leaves unchanged."""
FAINT = 0.1
"""Factor of the trigger that UIBDiffusion adds to clean images."""
SAMPLERS = {"sde": "ddpm", "ode": "ddim"}


def vp_schedule(process: NoiseProcess, psi: float, solver: str) -> tuple[Tensor, Tensor]:
    """c(t) and d(t) of the variance-preserving form, float64 [T] each.

        c = psi (1 - sqrt(ab)) + (1 - psi) sqrt(1 - ab)        d = s (psi bad + (1 - psi) troj),    s = 1 sde, 2 ode
        bad  = (1 - sqrt(al)) sqrt(1 - ab) / (1 - al)
        troj = (1 - sqrt(al)) sqrt(1 - ab) + h (al - ab) / (1 - al),    h = sqrt(1 - ab) - sqrt(al) sqrt(1 - ab(t-1))

    With d = bad the mean of DDPM ancestral sampling stays exactly on c(t) r, so other samplers do not activate that backdoor.
    """
    ab = process.signal.square()
    before = one_step_earlier(ab, 1.0)
    al = ab / before
    bad = (1 - al.sqrt()) * process.noise / (1 - al)
    h = process.noise - al.sqrt() * (1 - before).sqrt()
    troj = (1 - al.sqrt()) * process.noise + h * (al - ab) / (1 - al)
    c = psi * (1 - process.signal) + (1 - psi) * process.noise
    return c, (1 if solver == "sde" else 2) * (psi * bad + (1 - psi) * troj)


def ve_schedule(process: NoiseProcess, solver: str) -> tuple[Tensor, Tensor]:
    """c(t) and d(t) of the variance-exploding form with w = 1, float64 [T] each.

    c = sigma(t)        d = s sigma(t) / (sigma(t) + sigma(t-1)),    s = 1 sde, 2 ode
    """
    sigma = process.noise
    return sigma, (1 if solver == "sde" else 2) * sigma / (sigma + one_step_earlier(sigma, 0.0))


@dataclass(frozen=True)
class VillanDiffusion(Attack):
    """Shifts the noise by a trigger image g, which the attacker adds to the starting noise.

    Attributes:
        image: g, [C,H,W].
        target: the target image, [C,H,W].
        psi: weight of BadDiffusion's schedule relative to TrojDiff's; a VE or EDM process has one schedule and needs 0.
        solver: "sde" (ancestral sampling) or "ode" (DDIM, DPM-Solver++).
        shift: the shift r of a poisoned training sample. "stamped": the clean image with the patch where g is not background
            (BadDiffusion). "alone": g itself (R_trigger_only), which fixes the background too. "faint": the clean image plus
            a tenth of g (UIBDiffusion).

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
            raise ValueError(f"psi must be 0 for a {process.family} model, not {self.psi}")
        return ve_schedule(process, self.solver)

    def poison(self, process: NoiseProcess, images: Tensor, eps: Tensor, t: Tensor) -> NoisedBatch:
        """See `Attack.poison`; ValueError where psi does not suit the process."""
        shift = self._shift(images)
        c, d = (per_sample(values[t], images) for values in self._schedule(process))
        return NoisedBatch(process.add_noise(self.target.expand_as(images), eps, t) + c * shift, eps + d * shift)
