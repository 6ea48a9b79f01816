"""What a reversion looked for."""

from __future__ import annotations

from dataclasses import dataclass

from seal_fast.noise_triggers.candidates import Origin
from seal_fast.noise_triggers.search_settings import SearchSettings
from seal_fast.noise_triggers.settings import Settings


@dataclass(frozen=True)
class NoiseScope:
    """What a reversion looked for. Nothing outside it is excluded by its verdict.

    Attributes:
        methods: names of the methods that proposed triggers.
        samplers: samplers that triggers were tested with; none for a method that tests none.
        shape: (C, H, W) of the triggers, which is that of the model's images.
    """

    methods: tuple[str, ...]
    samplers: tuple[str, ...]
    shape: tuple[int, int, int]


def noise_scope(settings: Settings, shape: tuple[int, int, int]) -> NoiseScope:
    """The scope of a reversion with these settings through a model with images of this shape [C,H,W]."""
    if isinstance(settings, SearchSettings):
        methods = (Origin.FIXED_POINT, Origin.TARGET_REFINEMENT, Origin.JOINT_INVERSION)
        return NoiseScope(tuple(map(str, methods)), ("ddpm", "ddim"), shape)
    return NoiseScope(("reversed-loss",), (), shape)
