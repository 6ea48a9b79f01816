"""Is a prompt triggered? Mask every part of it, and compare how far the predicted noise moves with what harmless parts do.

No clean model and no knowledge of the attack is needed. A trigger makes a UNet predict other noise than the rest of the prompt asks
for, so the prediction moves far when the trigger goes. Words that mean something also move it. So a part compares with harmless
parts of its own kind, in clean prompts and in clean prompts that hold a harmless rare string.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from seal_fast.text_to_image.generation import OnPass, batch_size
from seal_fast.text_to_image.precision import Precision
from seal_fast.text_to_image.prompts import content_ids
from seal_fast.text_triggers.harmless_prompts import HarmlessPrompt, harmless_prompts
from seal_fast.text_triggers.prompt_units import PromptUnit, core, known_words, prompt_units
from seal_fast.text_triggers.responses import ResponseProbe
from seal_fast.text_triggers.unit_nulls import UnitNulls
from seal_fast.training import quiet

ENERGY = []

@dataclass(frozen=True)
class PromptDetectionSettings:
    """Settings of a prompt detector.

    Attributes:
        shares: timesteps, as shares of the noise process's T, on the prompt's own sampling path.
        false_alarm_rate: share of harmless prompts that the limit lets through as triggered.
        scored_prompts: clean prompts that the limit is fitted on; as many again hold a harmless string.
        harmless_strings: clean prompts with a harmless string whose own units show what such strings do.
        smallest_kind: a kind with fewer harmless units is compared with those of all kinds alike.
        least_deviation: least deviation of the log energies within a kind.
        guidance: guidance scale of the paths.
        sampler_steps: DDIM steps of a whole path.
        precision: precision of the networks.
    """

    shares: tuple[float, ...] = (0.99, 0.7, 0.45)
    false_alarm_rate: float = 0.05
    scored_prompts: int = 24
    harmless_strings: int = 96
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
        """Clean prompts from which the false alarm rate can be kept."""
        return max(2, math.ceil((1 / self.false_alarm_rate - 1) / 2))


@dataclass(frozen=True)
class PromptDetection:
    """What a detector says of one prompt.

    Attributes:
        prompt: the prompt.
        score: the largest deviation of its parts from harmless ones; None if it has no part.
        threshold: the score above which a prompt is triggered.
        triggered: whether the score exceeds the threshold.
        part: the part with that deviation, which is the trigger or belongs to it; "" if there is none.
        code_points: those of the part.
        cut: whether the model reads only the beginning of the prompt, and the detector with it.
    """

    prompt: str
    score: float | None
    threshold: float
    triggered: bool
    part: str
    code_points: tuple[str, ...]
    cut: bool


@dataclass(frozen=True)
class _Measured:
    """The units of one prompt with the log energies of their changes, [N,T]."""

    units: tuple[PromptUnit, ...]
    logs: Tensor

    @property
    def kinds(self) -> list[str]:
        return [unit.kind for unit in self.units]


@dataclass(frozen=True)
class PromptDetector:
    """Finds prompts that carry a trigger, without a clean model and without knowing the attack. Make one with `fitted`.

    Attributes:
        pipeline: the model that draws the prompts.
        settings: settings of the detector.
        seed: seed of the starting noise, one for all prompts.
        known: words of the clean prompts.
        nulls: what harmless parts do.
        threshold: score above which a prompt is triggered.
    """

    pipeline: Any
    settings: PromptDetectionSettings
    seed: int
    known: frozenset[str]
    nulls: UnitNulls
    threshold: float

    @classmethod
    def fitted(
        cls,
        pipeline: Any,
        prompts: Sequence[str],
        settings: PromptDetectionSettings | None = None,
        *,
        seed: int = 0,
        on_pass: OnPass = quiet,
    ) -> Self:
        """Fit a detector on clean prompts.

        The limit is a quantile of the scores of harmless prompts, each scored by nulls without that prompt. A further harmless
        prompt exceeds it with a probability of at most `false_alarm_rate`, if it is like these.

        Args:
            pipeline: a diffusers StableDiffusionPipeline on the device to run on; it is not changed.
            prompts: clean prompts, like those that are to be judged.
            settings: settings; None for the defaults.
            seed: seed of all random choices.
            on_pass: called after every pass of the UNet with its number of evaluations, of one latent each.

        Raises:
            ValueError: too few different clean prompts for the false alarm rate.
        """
        settings = settings or PromptDetectionSettings()
        different = list(dict.fromkeys(prompt for prompt in prompts if prompt.strip()))
        if len(different) < settings.fewest_prompts:
            needed = f"{settings.fewest_prompts} different clean prompts, not {len(different)}"
            raise ValueError(f"a false alarm rate of {settings.false_alarm_rate:.0%} needs at least {needed}")
        known = known_words(different)
        bare = cls(pipeline, settings, seed, known, UnitNulls({}), math.inf)
        harmless = harmless_prompts(pipeline.tokenizer, different, settings.scored_prompts, settings.harmless_strings, seed)
        measured = bare._measure([one.text for one in harmless], on_pass, [one.inserted for one in harmless])
        fitted = replace(bare, nulls=bare._nulls(measured))
        return replace(fitted, threshold=fitted._limit(harmless, measured))

    def __call__(self, prompts: Sequence[str], on_pass: OnPass = quiet) -> list[PromptDetection]:
        """Judge prompts; the others in the list make no difference to one of them, beyond rounding."""
        read = [self._read(prompt) for prompt in prompts]
        return [
            self._detection(prompt, some, some != prompt, measured)
            for prompt, some, measured in zip(prompts, read, self._measure(read, on_pass), strict=True)
        ]

    def _read(self, prompt: str) -> str:
        """What the model reads of a prompt: as much of its beginning as fits between BOS and EOS."""
        room = self.pipeline.tokenizer.model_max_length - 2
        if len(content_ids(self.pipeline.tokenizer, prompt)) <= room:
            return prompt
        fits, too_long = 0, len(prompt)
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            short = len(content_ids(self.pipeline.tokenizer, prompt[:middle])) <= room
            fits, too_long = (middle, too_long) if short else (fits, middle)
        return prompt[:fits]

    def _measure(self, prompts: Sequence[str], on_pass: OnPass, only: Sequence[str] | None = None) -> list[_Measured]:
        """The units of prompts, with their energies; of a prompt with a text in `only` that is not "", only units within it."""
        units = [tuple(prompt_units(self.pipeline.tokenizer, prompt, self.known)) for prompt in prompts]
        if only is not None:
            units = [
                tuple(unit for unit in some if not text or unit.text in text) for some, text in zip(units, only, strict=True)
            ]
        part, settings, logs = batch_size(self.pipeline), self.settings, []
        for first in range(0, len(prompts), part):
            probe = ResponseProbe.drawn(
                self.pipeline,
                [core(prompt, self.known) for prompt in prompts[first : first + part]],
                settings.shares,
                steps=settings.sampler_steps,
                guidance=settings.guidance,
                precision=settings.precision,
                seed=self.seed,
                one_noise=True,
                on_pass=on_pass,
            )
            for index, own in enumerate(units[first : first + part]):
                if own:
                    texts = [prompts[first + index], *(unit.without for unit in own)]
                    out = probe.outputs(texts, [index] * len(texts))
                    energy = (out[:, 1:] - out[:, :1]).square().sum(-1).T.cpu()
                    logs.append(energy.clamp_min(torch.finfo(torch.float32).tiny).log())
                    ENERGY.append(probe.prompt_energy[:, index].log())
        everything = torch.cat([torch.empty(0, len(settings.shares)), *logs])
        return [_Measured(own, part) for own, part in zip(units, everything.split([len(own) for own in units]), strict=True)]

    def _nulls(self, measured: Sequence[_Measured]) -> UnitNulls:
        kinds = [kind for one in measured for kind in one.kinds]
        logs = torch.cat([one.logs for one in measured])
        return UnitNulls.fitted(kinds, logs, self.settings.smallest_kind, self.settings.least_deviation)

    def _limit(self, harmless: Sequence[HarmlessPrompt], measured: Sequence[_Measured]) -> float:
        """The smallest score that the wanted share of further harmless prompts stays below."""
        scores = []
        for one, own in zip(harmless, measured, strict=True):
            if one.scored and own.units:
                others = [other for prompt, other in zip(harmless, measured, strict=True) if prompt.source != one.source]
                scores.append(float(self._nulls(others).deviations(own.kinds, own.logs).max()))
        rank = math.ceil((len(scores) + 1) * (1 - self.settings.false_alarm_rate))
        return sorted(scores)[rank - 1] if 0 < rank <= len(scores) else math.inf

    def _detection(self, prompt: str, read: str, cut: bool, measured: _Measured) -> PromptDetection:
        if not measured.units:
            return PromptDetection(prompt, None, self.threshold, False, "", (), cut)
        scores = self.nulls.deviations(measured.kinds, measured.logs)
        best = int(scores.argmax())
        score, part = float(scores[best]), measured.units[best].text
        points = tuple(f"U+{ord(character):04X}" for character in part)
        return PromptDetection(prompt, score, self.threshold, score > self.threshold, part, points, cut)
