"""Settings of the search for text triggers."""

from __future__ import annotations

from dataclasses import dataclass

from seal_fast.text_to_image.precision import Precision


@dataclass(frozen=True)
class Budget:
    """Where a search ends before it is complete; None for no limit.

    Attributes:
        evaluations: UNet evaluations of one latent.
        seconds: wall time.
    """

    evaluations: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class TextSearchSettings:
    """Settings of the search for text triggers.

    Attributes:
        guidance: guidance scale of the images that verify a candidate.
        sampler_steps: DDIM steps of these images.
        precision: precision of the networks.
    """

    guidance: float = 7.5
    sampler_steps: int = 25
    precision: Precision = "bf16"
