"""What a reversion is: its result, and the memory that its forward passes may take."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from seal_fast.checkpoints.trigger import Trigger

PIXELS = 2**18
"""Pixels per forward pass without gradients, which bounds its memory: 1024 images of 16 px, 4 of 256 px."""


def rows_per_pass(images: Tensor) -> int:
    """How many of the images [N,C,H,W] go through the network at once."""
    return max(1, PIXELS // (images.shape[2] * images.shape[3]))


@dataclass(frozen=True)
class Reversion:
    """What a reversion found.

    Attributes:
        trigger: reverted mu and gamma.
        loss: residual per dimension the reversion ended with: the reversed loss (published), the variance of eps - f at
            the fixed point, or the loss of the poisoned rows; NaN if no iteration ran.
        finite: False if the loss or the trigger left the floating-point range.
        evaluations: denoiser evaluations spent, counted in images.
        collapse: how many times more alike the trigger makes the model's samples, see
            `seal_fast.noise_triggers.activation_test`; None where it
            was not tried.
        clean_dispersion: spread of the model's samples without a trigger; None likewise.
        sampler: name in `seal_fast.diffusion.SAMPLERS` of the one it was tried with; None likewise.
    """

    trigger: Trigger
    loss: float
    finite: bool
    evaluations: int
    collapse: float | None = None
    clean_dispersion: float | None = None
    sampler: str | None = None
