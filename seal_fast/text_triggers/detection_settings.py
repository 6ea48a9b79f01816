"""Settings of a prompt detector."""

from __future__ import annotations

import math
from dataclasses import dataclass

from seal_fast.text_to_image.precision import Precision


@dataclass(frozen=True)
class PromptDetectionSettings:
    """Settings of a prompt detector.

    Of timesteps from .99 T to .1 T, the middle and the end told triggers from harmless strings best: the beginning hardly sees
    a style or a small patch. Neither more starting noises nor energies relative to the whole prompt's did better.

    Attributes:
        shares: timesteps, as shares of the noise process's T.
        false_alarm_rate: share of clean prompts, and of clean prompts with a harmless string, that may count as triggered.
        fitted_prompts: clean prompts whose parts are measured.
        strings_per_prompt: harmless strings that are measured with each of them.
        smallest_kind: a kind with fewer harmless parts compares with wider ones, see `PartNulls`.
        least_deviation: least deviation of the log energies within a kind.
        guidance: guidance scale of the paths.
        sampler_steps: DDIM steps of a whole path.
        precision: precision of the networks.

    Raises:
        ValueError: the false alarm rate does not lie between 0 and 1.
    """

    shares: tuple[float, ...] = (0.45, 0.2)
    false_alarm_rate: float = 0.05
    fitted_prompts: int = 40
    strings_per_prompt: int = 4
    smallest_kind: int = 8
    least_deviation: float = 0.5
    guidance: float = 7.5
    sampler_steps: int = 10
    precision: Precision = "bf16"

    def __post_init__(self) -> None:
        if not 0 < self.false_alarm_rate < 1:
            raise ValueError(f"the false alarm rate must lie between 0 and 1, not {self.false_alarm_rate}")

    @property
    def fewest_prompts(self) -> int:
        """Clean prompts from which the false alarm rate can be kept: of n + 1 scores the last is the largest in 1 / (n + 1)."""
        return max(2, math.ceil(1 / self.false_alarm_rate) - 1)
