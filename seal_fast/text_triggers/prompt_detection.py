"""Is a prompt triggered? Mask its unusual parts, and compare how far the predicted noise moves with what harmless parts do.

No clean model and no knowledge of the attack is needed. Words and pairs of words that stand in clean prompts are harmless. All
other parts go one by one: a trigger moves the noise that the UNet predicts further than a harmless string of its kind,

    log || e(x_t, t, E(p)) - e(x_t, t, E(p without the part)) ||^2

The states x_t lie on the sampling path of the prompt without any unusual part. On the triggered prompt's own path the target is
already drawn, and the prediction moves less. Of timesteps from .99 T to .1 T, the middle and the end told triggers from
harmless strings best: the beginning hardly sees a style or a small patch. Neither more starting noises nor an energy that is
divided by the whole prompt's did better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from seal_fast.text_to_image.generation import OnPass, batch_size
from seal_fast.text_to_image.precision import Precision
from seal_fast.text_to_image.prompts import content_ids
from seal_fast.text_triggers.harmless_prompts import with_harmless_string
from seal_fast.text_triggers.part_nulls import PartNulls
from seal_fast.text_triggers.prompt_parts import Familiar, PromptPart, prompt_parts
from seal_fast.text_triggers.responses import ResponseProbe
from seal_fast.training import quiet


@dataclass(frozen=True)
class PromptDetectionSettings:
    """Settings of a prompt detector.

    Attributes:
        shares: timesteps, as shares of the noise process's T.
        false_alarm_rate: share of clean prompts, and of clean prompts with a harmless string, that may count as triggered.
        fitted_prompts: clean prompts that the detector is fitted on.
        strings_per_prompt: harmless strings that each of them is fitted on.
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
        """Clean prompts from which the false alarm rate can be kept."""
        return max(2, math.ceil(1 / self.false_alarm_rate) - 1)


@dataclass(frozen=True)
class PromptDetection:
    """What a detector says of one prompt.

    Attributes:
        prompt: the prompt.
        score: the largest deviation of its parts from harmless ones; None if all its parts stand in clean prompts.
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
    """The parts of one prompt, and the log energies of their changes float32 [N,T]."""

    parts: tuple[PromptPart, ...]
    logs: Tensor

    @property
    def kinds(self) -> list[str]:
        return [part.kind for part in self.parts]


@dataclass(frozen=True)
class _Measurement:
    """Measures prompts of one model.

    Attributes:
        pipeline: the model.
        settings: settings of the detector.
        seed: seed of the starting noise.
        on_pass: see `PromptDetector.fitted`.
    """

    pipeline: Any
    settings: PromptDetectionSettings
    seed: int
    on_pass: OnPass

    def __call__(self, prompts: Sequence[str], familiar: Sequence[Familiar]) -> list[_Measured]:
        """The parts of prompts with their log energies. A prompt without unusual parts needs no evaluation."""
        tokenizer, times = self.pipeline.tokenizer, len(self.settings.shares)
        parts = [tuple(prompt_parts(tokenizer, *both)) for both in zip(prompts, familiar, strict=True)]
        energies = [torch.zeros(len(some), times) for some in parts]
        cores: dict[str, list[int]] = {}
        for index, some in enumerate(parts):
            if some:
                cores.setdefault(familiar[index].core(prompts[index]), []).append(index)
        batch, different = batch_size(self.pipeline), list(cores)
        for first in range(0, len(different), batch):
            probe = self._paths(different[first : first + batch])
            tried = [(place, index) for place, path in enumerate(probe.prompts) for index in cores[path]]
            texts = [[prompts[index], *(part.without for part in parts[index])] for _, index in tried]
            places = [place for (place, _), some in zip(tried, texts, strict=True) for _ in some]
            outputs = probe.outputs([text for some in texts for text in some], places)
            for (_, index), out in zip(tried, outputs.split([len(some) for some in texts], dim=1), strict=True):
                energies[index] = (out[:, 1:] - out[:, :1]).square().sum(-1).T.cpu()
        least = torch.finfo(torch.float32).tiny
        return [_Measured(some, energy.clamp_min(least).log()) for some, energy in zip(parts, energies, strict=True)]

    def _paths(self, prompts: Sequence[str]) -> ResponseProbe:
        settings = self.settings
        return ResponseProbe.drawn(
            self.pipeline,
            prompts,
            settings.shares,
            steps=settings.sampler_steps,
            guidance=settings.guidance,
            precision=settings.precision,
            seed=self.seed,
            one_noise=True,
            on_pass=self.on_pass,
        )


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
        prompts: Sequence[str],
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
            prompts: clean prompts, like those that it will examine. Their words count as harmless, so more of them help.
            settings: settings; None for the defaults.
            seed: seed of all random choices.
            on_pass: called after every pass of the UNet with its number of evaluations, of one latent each.

        Raises:
            ValueError: too few different clean prompts for the false alarm rate.
        """
        settings = settings or PromptDetectionSettings()
        different = list(dict.fromkeys(_read(pipeline.tokenizer, prompt) for prompt in prompts if prompt.strip()))
        if len(different) < settings.fewest_prompts:
            needed = f"{settings.fewest_prompts} different clean prompts, not {len(different)}"
            raise ValueError(f"a false alarm rate of {settings.false_alarm_rate:.0%} needs at least {needed}")
        familiar = Familiar.of(different)
        order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed)).tolist()
        clean = [different[index] for index in order[: max(settings.fitted_prompts, settings.fewest_prompts)]]
        sources = clean * (1 + settings.strings_per_prompt)
        texts = [*clean, *with_harmless_string(pipeline.tokenizer, sources[len(clean) :], different, seed)]
        others = {prompt: familiar.without(prompt) for prompt in clean}
        read = [_read(pipeline.tokenizer, text) for text in texts]
        measured = _Measurement(pipeline, settings, seed, on_pass)(read, [others[source] for source in sources])
        limit = _limit(sources, measured, len(clean), settings)
        return cls(pipeline, settings, seed, familiar, _nulls(measured, settings), limit)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], on_pass: OnPass = quiet) -> list[PromptDetection]:
        """Examine prompts; the others in the list make no difference to one of them, beyond rounding."""
        read = [_read(self.pipeline.tokenizer, prompt) for prompt in prompts]
        measured = _Measurement(self.pipeline, self.settings, self.seed, on_pass)(read, [self.familiar] * len(read))
        return [self._detection(*one) for one in zip(prompts, read, measured, strict=True)]

    def _detection(self, prompt: str, read: str, measured: _Measured) -> PromptDetection:
        cut = read != prompt
        if not measured.parts:
            return PromptDetection(prompt, None, self.threshold, False, "", (), cut)
        scores = self.nulls.deviations(measured.kinds, measured.logs)
        best = int(scores.argmax())
        score, part = float(scores[best]), measured.parts[best].text
        points = tuple(f"U+{ord(character):04X}" for character in part)
        return PromptDetection(prompt, score, self.threshold, score > self.threshold, part, points, cut)


def _read(tokenizer: Any, prompt: str) -> str:
    """What the model reads of a prompt: as much of its beginning as fits between BOS and EOS."""
    room = tokenizer.model_max_length - 2
    if len(content_ids(tokenizer, prompt)) <= room:
        return prompt
    fits, too_long = 0, len(prompt)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        short = len(content_ids(tokenizer, prompt[:middle])) <= room
        fits, too_long = (middle, too_long) if short else (fits, middle)
    return prompt[:fits]


def _nulls(measured: Sequence[_Measured], settings: PromptDetectionSettings) -> PartNulls:
    kinds = [kind for one in measured for kind in one.kinds]
    logs = torch.cat([one.logs for one in measured])
    return PartNulls.fitted(kinds, logs, settings.smallest_kind, settings.least_deviation) if kinds else PartNulls({})


def _limit(sources: Sequence[str], measured: Sequence[_Measured], clean: int, settings: PromptDetectionSettings) -> float:
    """The least limit that keeps the false alarm rate on the first `clean` prompts, and on the others.

    The rank is that of conformal prediction: of n+1 exchangeable scores the last one exceeds the k-th of the others with a
    probability of at most 1 - k / (n+1). Prompts that come from the same clean prompt are left out of each other's nulls.
    """
    nulls = {
        source: _nulls([one for name, one in zip(sources, measured, strict=True) if name != source], settings)
        for source in dict.fromkeys(sources)
    }
    scores = [
        float(nulls[source].deviations(own.kinds, own.logs).max()) if own.parts else -math.inf
        for source, own in zip(sources, measured, strict=True)
    ]
    groups = [sorted(some) for some in (scores[:clean], scores[clean:]) if some]
    return max(some[math.ceil((len(some) + 1) * (1 - settings.false_alarm_rate)) - 1] for some in groups)
