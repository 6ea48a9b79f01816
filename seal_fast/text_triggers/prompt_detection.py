"""Is a prompt triggered? Mask its unusual parts, and compare how far the predicted noise moves with what harmless parts do.

No clean model and no knowledge of the attack is needed. Words and pairs of words that stand in clean prompts are familiar. All
other parts are masked one by one: a trigger moves the noise that the UNet predicts further than a harmless string of its kind.
A trigger that is made of familiar words in a familiar order cannot be told from what prompts mean, so a prompt without any
unusual part is not called clean but familiar.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import torch

from seal_fast.text_to_image.generation import OnPass
from seal_fast.text_to_image.prompts import beginning_read
from seal_fast.text_triggers.detection_settings import PromptDetectionSettings
from seal_fast.text_triggers.harmless_prompts import with_harmless_string
from seal_fast.text_triggers.part_energies import MeasuredPrompt, PartProbe
from seal_fast.text_triggers.part_nulls import PartNulls, conformal_limit
from seal_fast.text_triggers.prompt_parts import Familiar
from seal_fast.training import quiet


class PromptVerdict(StrEnum):
    """What a detector says of a prompt."""

    TRIGGERED = "triggered"
    """A part moves the predicted noise further than harmless parts of its kind."""
    CLEAN = "clean"
    """None of the unusual parts does."""
    FAMILIAR = "familiar"
    """The prompt has no unusual part that the model reads, so nothing was measured."""


@dataclass(frozen=True)
class PromptDetection:
    """What a detector says of one prompt.

    Attributes:
        prompt: the prompt.
        verdict: triggered, clean or familiar.
        score: the largest deviation of its unusual parts from harmless ones; None if it has none.
        threshold: the score above which a prompt is triggered.
        part: the part with that deviation, which is the trigger or belongs to it; "" if there is none.
        code_points: those of the part.
        cut: whether the model reads only the beginning of the prompt, and the detector with it.
    """

    prompt: str
    verdict: PromptVerdict
    score: float | None
    threshold: float
    part: str
    code_points: tuple[str, ...]
    cut: bool

    @property
    def triggered(self) -> bool:
        return self.verdict is PromptVerdict.TRIGGERED


@dataclass(frozen=True)
class PromptDetector:
    """Finds prompts that carry a trigger, without a clean model and without knowing the attack. Make one with `fitted`.

    Attributes:
        pipeline: the model that draws the prompts.
        settings: settings of the detector.
        seed: seed of the starting noise, one for all prompts.
        familiar: words and pairs of words of the clean prompts.
        nulls: what harmless parts do.
        threshold: score above which a prompt is triggered.
    """

    pipeline: Any
    settings: PromptDetectionSettings
    seed: int
    familiar: Familiar
    nulls: PartNulls
    threshold: float

    @classmethod
    def fitted(
        cls,
        pipeline: Any,
        clean_prompts: Sequence[str],
        settings: PromptDetectionSettings | None = None,
        *,
        seed: int = 0,
        on_pass: OnPass = quiet,
    ) -> Self:
        """Fit a detector on clean prompts.

        The limit is such that a further clean prompt, and a further one with a harmless string, exceeds it with a probability
        of at most `false_alarm_rate`, if it is like these. Every prompt is scored as if it were not among them.

        Args:
            pipeline: a diffusers StableDiffusionPipeline on the device to run on; it is not changed.
            clean_prompts: prompts without a trigger, like those that it will examine. Their words count as harmless, so more of
                them help.
            settings: settings; None for the defaults.
            seed: seed of all random choices.
            on_pass: called after every pass of the UNet with its number of evaluations, of one latent each.

        Raises:
            ValueError: too few different clean prompts for the false alarm rate, or predictions that are not finite.
        """
        settings = settings or PromptDetectionSettings()
        tokenizer = pipeline.tokenizer
        different = list(dict.fromkeys(beginning_read(tokenizer, prompt) for prompt in clean_prompts if prompt.strip()))
        if len(different) < settings.fewest_prompts:
            needed = f"{settings.fewest_prompts} different clean prompts, not {len(different)}"
            raise ValueError(f"a false alarm rate of {settings.false_alarm_rate:.0%} needs at least {needed}")
        familiar = Familiar.of(different)
        order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed)).tolist()
        clean = [different[index] for index in order[: max(settings.fitted_prompts, settings.fewest_prompts)]]
        sources = clean * (1 + settings.strings_per_prompt)
        strange = with_harmless_string(tokenizer, sources[len(clean) :], different, seed)
        others = {prompt: familiar.without(prompt) for prompt in clean}
        measured = PartProbe(pipeline, settings, seed, on_pass)(
            [*clean, *(beginning_read(tokenizer, prompt) for prompt in strange)], [others[source] for source in sources]
        )
        pairs = list(zip(sources, measured, strict=True))
        limit = conformal_limit((pairs[: len(clean)], pairs[len(clean) :]), settings)
        return cls(pipeline, settings, seed, familiar, PartNulls.fitted(measured, settings), limit)

    def __call__(self, prompts: Sequence[str], on_pass: OnPass = quiet) -> list[PromptDetection]:
        """Examine prompts; the others in the list make no difference to one of them, beyond rounding.

        Raises:
            ValueError: the UNet predicts noise that is not finite.
        """
        read = [beginning_read(self.pipeline.tokenizer, prompt) for prompt in prompts]
        measured = PartProbe(self.pipeline, self.settings, self.seed, on_pass)(read, [self.familiar] * len(read))
        return [
            self._detection(prompt, prompt != beginning, one)
            for prompt, beginning, one in zip(prompts, read, measured, strict=True)
        ]

    def _detection(self, prompt: str, cut: bool, measured: MeasuredPrompt) -> PromptDetection:
        if not measured.parts:
            return PromptDetection(prompt, PromptVerdict.FAMILIAR, None, self.threshold, "", (), cut)
        scores = self.nulls.deviations(measured)
        best = int(scores.argmax())
        score, part = float(scores[best]), measured.parts[best].text
        verdict = PromptVerdict.TRIGGERED if score > self.threshold else PromptVerdict.CLEAN
        points = tuple(f"U+{ord(character):04X}" for character in part)
        return PromptDetection(prompt, verdict, score, self.threshold, part, points, cut)
