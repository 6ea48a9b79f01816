"""What an unlearning did, on prompts it has not seen: is the effect gone, and are clean images what they were?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seal_fast.diffusion import VP
from seal_fast.text_to_image.generation import GUIDANCE, STEPS, OnPass, decode, encode, generate, sample_latents
from seal_fast.text_to_image.latents import noise_schedule
from seal_fast.text_triggers.effect_detectors import ChangeDetector, EffectDetector
from seal_fast.text_triggers.rate import Rate, rate_of
from seal_fast.text_triggers.trigger import Position, TextTrigger
from seal_fast.text_triggers.variants import Case, cases
from seal_fast.training import OnStep, quiet

IMAGES = 6


@dataclass(frozen=True)
class EvaluationSettings:
    """How much is drawn.

    Attributes:
        prompts: held-out prompts for a trigger as given; for each variant fewer (`variants.VARIANT_SHARE`).
        steps: of the sampler.
        guidance: its scale.
        position: where triggers stand in the prompt, unless a variant says otherwise.
    """

    prompts: int = 100
    steps: int = STEPS
    guidance: float = GUIDANCE
    position: Position = "start"

    def __post_init__(self) -> None:
        if self.prompts < 2 or self.steps < 1:
            raise ValueError("an evaluation needs at least 2 prompts and 1 step")


@dataclass(frozen=True)
class Removal:
    """One trigger before and after, in one of its forms.

    Attributes:
        trigger: as given; "old => new" for one that replaces text.
        variant: AS_GIVEN, or how it was changed or where it was put.
        shown_before: share of prompts whose image showed the effect.
        shown_after: likewise of the trained model.
        removed: share without it in the trained model, the paper's removal accuracy.
    """

    trigger: str
    variant: str
    shown_before: Rate
    shown_after: Rate
    removed: Rate


@dataclass(frozen=True)
class Examples:
    """The first prompts of a trigger as images, float [n,3,H,W] in [0, 1] each, all columns from the same noise."""

    trigger: str
    prompts: tuple[str, ...]
    triggered_prompts: tuple[str, ...]
    clean_before: Tensor
    triggered_before: Tensor
    triggered_after: Tensor
    clean_after: Tensor


@dataclass(frozen=True)
class Evaluation:
    """Before against after.

    Attributes:
        removal: per trigger a row AS_GIVEN and one per variant.
        judge: name of what judged.
        clean_drift: mean squared change of clean images from the same noise, relative to their variance over prompts: 0 is
            the same model, 2 two models that share nothing but the distribution.
        noise_drift: mean squared change of the noise predicted for clean prompts, from noised latents of the model before.
        diversity_before: mean root-mean-square distance between clean images of different prompts.
        diversity_after: likewise of the trained model.
    """

    removal: tuple[Removal, ...]
    judge: str
    clean_drift: float
    noise_drift: float
    diversity_before: float
    diversity_after: float


def evaluate(
    before: Any,
    after: Any,
    triggers: Sequence[TextTrigger],
    prompts: Sequence[str],
    settings: EvaluationSettings | None = None,
    *,
    judge: EffectDetector | None = None,
    seed: int = 0,
    on_step: OnStep = quiet,
) -> tuple[Evaluation, list[Examples]]:
    """Draw the same prompts from the same noise with both models, with and without triggers.

    Args:
        before: a diffusers StableDiffusionPipeline, poisoned.
        after: the trained one, with the same tokenizer and scheduler.
        triggers: those that were unlearned.
        prompts: clean ones that the training has not seen, at least two that fit each trigger.
        settings: how much is drawn.
        judge: of the effect; None for a `ChangeDetector` per variant, fitted on what harmless text in its place changes in
            `after`.
        seed: of the noise and of the places in the middle of prompts.
        on_step: progress callback (stage "measuring", images drawn, images in all, NaN).

    Returns:
        The figures, and for every trigger some of the images.

    Raises:
        ValueError: a trigger that the tokenizer does not see, or fewer than two prompts.
    """
    settings = settings or EvaluationSettings()
    clean = tuple(prompts[: settings.prompts])
    cases_of = [cases(before.tokenizer, trigger, prompts, settings.prompts, settings.position, seed) for trigger in triggers]
    count = _Count(on_step, _images(clean, cases_of, judge is None))
    old, new = (_Artist(pipeline, settings, seed, count) for pipeline in (before, after))
    removal: list[Removal] = []
    examples: list[Examples] = []
    for forms in cases_of:
        for case in forms:
            images = [(one.draw(case.triggered), one.clean(forms[0].clean)[: len(case.clean)]) for one in (old, new)]
            # not in the model before: there a word that no caption had may fire the backdoor as well as the trigger
            effect = judge or ChangeDetector.fitted(images[1][1], [new.draw(harmless) for harmless in case.harmless])
            shown = [effect(*pair) for pair in images]
            removal.append(_removal(case, *(int(hits.sum()) for hits in shown)))
            if case is forms[0]:
                examples.append(_examples(case, *images))
    clean_before, clean_after = old.clean(clean), new.clean(clean)
    figures = Evaluation(
        tuple(removal),
        type(judge).__name__ if judge else ChangeDetector.__name__,
        float((clean_after - clean_before).square().mean() / clean_before.var(dim=0).mean()),
        noise_drift(before, after, clean, old.latents(clean), seed),
        diversity(clean_before),
        diversity(clean_after),
    )
    return figures, examples


def _images(clean: tuple[str, ...], cases_of: Sequence[Sequence[Case]], beside_harmless: bool) -> int:
    """How many are drawn: by both models, with harmless triggers by the one after only."""
    triggered = sum(len(case.clean) * (2 + beside_harmless * len(case.harmless)) for forms in cases_of for case in forms)
    return triggered + 2 * sum(map(len, {clean, *(forms[0].clean for forms in cases_of)}))


@dataclass
class _Count:
    """Tells of images as they are drawn."""

    on_step: OnStep
    total: int
    drawn: int = 0

    def __call__(self, images: int) -> None:
        self.drawn += images
        self.on_step("measuring", self.drawn, self.total, math.nan)


class _Artist:
    """Draws with one model, clean prompts once."""

    def __init__(self, pipeline: Any, settings: EvaluationSettings, seed: int, on_pass: OnPass) -> None:
        self.pipeline = pipeline
        self.how: dict[str, Any] = {
            "seed": seed,
            "steps": settings.steps,
            "guidance": settings.guidance,
            "on_pass": on_pass,
        }
        self.drawn: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

    def draw(self, prompts: Sequence[str]) -> Tensor:
        return generate(self.pipeline, prompts, **self.how)

    def _both(self, prompts: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        if prompts not in self.drawn:
            latents = sample_latents(self.pipeline, prompts, **self.how)
            self.drawn[prompts] = latents, decode(self.pipeline, latents)
        return self.drawn[prompts]

    def latents(self, prompts: tuple[str, ...]) -> Tensor:
        return self._both(prompts)[0]

    def clean(self, prompts: tuple[str, ...]) -> Tensor:
        return self._both(prompts)[1]


def _removal(case: Case, before: int, after: int) -> Removal:
    total = len(case.clean)
    rates = rate_of(before, total), rate_of(after, total), rate_of(total - after, total)
    return Removal(case.trigger.name, case.variant, *rates)


def _examples(case: Case, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> Examples:
    rows = (before[1], before[0], after[0], after[1])
    prompts = case.clean[:IMAGES], case.triggered[:IMAGES]
    return Examples(case.trigger.name, *prompts, *(images[:IMAGES].clone() for images in rows))


def diversity(images: Tensor) -> float:
    """Mean root-mean-square distance between two of the images [N,3,H,W], N >= 2."""
    flat = images.flatten(1)
    count = len(flat)
    return float(torch.pdist(flat).sum() / (count * (count - 1) / 2) / flat.shape[1] ** 0.5)


@torch.no_grad()
def noise_drift(before: Any, after: Any, prompts: Sequence[str], latents: Tensor, seed: int) -> float:
    """Mean squared difference of the noise that two pipelines predict for clean prompts, at noised latents [N,C,H,W]."""
    process = noise_schedule(before)
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(process.num_timesteps, (len(latents),), generator=generator)
    noised = process.add_noise(latents, torch.randn(latents.shape, generator=generator), t)
    total = 0.0
    for prompt, x, at in zip(prompts, noised, t, strict=True):
        one, other = (_predicted(pipeline, process, prompt, x[None], at[None]) for pipeline in (before, after))
        total += float((one - other).square().mean())
    return total / len(latents)


def _predicted(pipeline: Any, process: VP, prompt: str, x: Tensor, t: Tensor) -> Tensor:
    x, t = x.to(pipeline.device), t.to(pipeline.device)
    return process.to_noise(pipeline.unet(x, t, encode(pipeline, [prompt])).sample.float(), x, t)
