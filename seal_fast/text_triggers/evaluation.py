"""Evaluation of an unlearning on held-out prompts: whether triggers still have an effect, and how much clean images changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seal_fast.diffusion import VP
from seal_fast.text_to_image.generation import GUIDANCE, STEPS, OnPass, decode, sample_latents
from seal_fast.text_to_image.latents import noise_schedule, predict
from seal_fast.text_to_image.precision import Precision
from seal_fast.text_to_image.prompts import encode
from seal_fast.text_triggers.effect_detectors import ChangeDetector, EffectDetector
from seal_fast.text_triggers.rate import Rate, rate_of
from seal_fast.text_triggers.trigger import Position, TextTrigger
from seal_fast.text_triggers.variants import PromptSet, prompt_sets
from seal_fast.text_triggers.vocabulary import holds
from seal_fast.training import OnStep, quiet

EXAMPLES = 6
"""Prompts per trigger whose images are kept."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What is drawn for an evaluation.

    Attributes:
        prompts: held-out prompts for a trigger as given; each variant has fewer, see `variants.VARIANT_DIVISOR`.
        steps: steps of the sampler.
        guidance: guidance scale.
        position: where triggers stand in the prompt, unless the caller or a variant says otherwise.
        precision: in which images are drawn, see `seal_fast.text_to_image.precision.autocast`.
    """

    prompts: int = 100
    steps: int = STEPS
    guidance: float = GUIDANCE
    position: Position = "start"
    precision: Precision = "bf16"

    def __post_init__(self) -> None:
        if self.prompts < 2 or self.steps < 1:
            raise ValueError("an evaluation needs at least 2 prompts and 1 step")


@dataclass(frozen=True)
class TriggerEffect:
    """How often one variant of a trigger had its effect, before the unlearning and after it.

    Attributes:
        trigger: name of the trigger as given.
        variant: name of the variant, see `seal_fast.text_triggers.variants`.
        before: share of the images with the effect, drawn by the poisoned model.
        after: share of the images with the effect, drawn by the unlearned model.
        removal_accuracy: share of the images without the effect, drawn by the unlearned model; the paper's measure.
    """

    trigger: str
    variant: str
    before: Rate
    after: Rate
    removal_accuracy: Rate


@dataclass(frozen=True)
class Examples:
    """Images of the first n prompts of a trigger, float [n,3,H,W] in [0, 1]; image i always starts from the same noise."""

    trigger: str
    prompts: tuple[str, ...]
    triggered_prompts: tuple[str, ...]
    clean_before: Tensor
    triggered_before: Tensor
    triggered_after: Tensor
    clean_after: Tensor


@dataclass(frozen=True)
class Evaluation:
    """The model before the unlearning against the model after it.

    Attributes:
        effects: for every trigger its effect as given, then the effects of its variants.
        detector: name of the effect detector.
        clean_drift: mean squared change of clean images from the same noise, relative to their variance over prompts: 0 for
            equal models, 2 for models that have only the distribution of their images in common.
        noise_drift: mean squared change of the noise predicted for clean prompts, in noised latents of the model before.
        diversity_before: mean root-mean-square distance between clean images of different prompts, drawn by the model before.
        diversity_after: the same for the model after.
    """

    effects: tuple[TriggerEffect, ...]
    detector: str
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
    positions: Sequence[Position] | None = None,
    needed_words: Sequence[str | None] | None = None,
    detector: EffectDetector | None = None,
    seed: int = 0,
    on_step: OnStep = quiet,
) -> tuple[Evaluation, list[Examples]]:
    """Draw the same prompts from the same noise with both models, with and without triggers, and compare.

    Args:
        before: the poisoned StableDiffusionPipeline.
        after: the unlearned one, with the same tokenizer and scheduler.
        triggers: those that were unlearned.
        prompts: clean prompts that the training did not use, at least two that fit each trigger.
        settings: what is drawn.
        positions: where each trigger stands as given; None for `settings.position`.
        needed_words: for each trigger a word, or None; it is measured on the prompts that hold the word if there are two. None
            measures all triggers on all prompts.
        detector: the effect detector; None for a `ChangeDetector` per variant, fitted on the changes that control triggers make
            in `after`.
        seed: seed of the starting noise and of random places in prompts.
        on_step: progress callback (stage "measuring", images drawn, images in all, NaN).

    Returns:
        The figures, and for every trigger some of the images.

    Raises:
        ValueError: a trigger that the tokenizer drops, or fewer than two prompts.
    """
    settings = settings or EvaluationSettings()
    clean = tuple(prompts[: settings.prompts])
    places = [settings.position] * len(triggers) if positions is None else positions
    words = [None] * len(triggers) if needed_words is None else needed_words
    sets = [
        prompt_sets(before.tokenizer, one, _holding(prompts, word), settings.prompts, place, seed)
        for one, place, word in zip(triggers, places, words, strict=True)
    ]
    progress = _Progress(on_step, _count_images(clean, sets, with_controls=detector is None))
    old, new = (_Renderer(pipeline, settings, seed, progress) for pipeline in (before, after))
    effects: list[TriggerEffect] = []
    examples: list[Examples] = []
    for as_given, *others in sets:
        effect, images = _measure(as_given, as_given.clean, old, new, detector)
        effects += [effect, *(_measure(variant, as_given.clean, old, new, detector)[0] for variant in others)]
        examples.append(images)
    clean_before, clean_after = old.clean_images(clean), new.clean_images(clean)
    evaluation = Evaluation(
        tuple(effects),
        type(detector).__name__ if detector else ChangeDetector.__name__,
        clean_drift=float((clean_after - clean_before).square().mean() / clean_before.var(dim=0).mean()),
        noise_drift=noise_drift(before, after, clean, old.clean_latents(clean), seed),
        diversity_before=diversity(clean_before),
        diversity_after=diversity(clean_after),
    )
    return evaluation, examples


def _holding(prompts: Sequence[str], word: str | None) -> Sequence[str]:
    """The prompts that hold a word; all of them if fewer than two do."""
    held = [prompt for prompt in prompts if holds(prompt, word)]
    return held if len(held) > 1 else prompts


def _measure(
    variant: PromptSet, clean: tuple[str, ...], old: _Renderer, new: _Renderer, detector: EffectDetector | None
) -> tuple[TriggerEffect, Examples]:
    """The effect of one variant, and images of it. `clean` are the prompts of all variants, so that each is drawn once."""
    total = len(variant.clean)
    triggered_before, clean_before = old.images(variant.triggered), old.clean_images(clean)[:total]
    triggered_after, clean_after = new.images(variant.triggered), new.clean_images(clean)[:total]
    # not fitted on the model before: in it a word that no caption had may activate the backdoor as well as the trigger does
    detect = detector or ChangeDetector.fitted(clean_after, [new.images(prompts) for prompts in variant.controls])
    before, after = int(detect(triggered_before, clean_before).sum()), int(detect(triggered_after, clean_after).sum())
    rates = rate_of(before, total), rate_of(after, total), rate_of(total - after, total)
    images = (clean_before, triggered_before, triggered_after, clean_after)
    return (
        TriggerEffect(variant.trigger.name, variant.variant, *rates),
        Examples(
            variant.trigger.name,
            variant.clean[:EXAMPLES],
            variant.triggered[:EXAMPLES],
            *(some[:EXAMPLES].clone() for some in images),
        ),
    )


def _count_images(clean: tuple[str, ...], sets: Sequence[Sequence[PromptSet]], with_controls: bool) -> int:
    """Number of images that an evaluation draws. Both models draw them, but only the model after draws control triggers."""
    triggered = sum(len(one.clean) * (2 + with_controls * len(one.controls)) for variants in sets for one in variants)
    return triggered + 2 * sum(map(len, {clean, *(variants[0].clean for variants in sets)}))


@dataclass
class _Progress:
    """Counts images as they are drawn, and reports them."""

    on_step: OnStep
    total: int
    drawn: int = 0

    def __call__(self, images: int) -> None:
        self.drawn += images
        self.on_step("measuring", self.drawn, self.total, math.nan)


class _Renderer:
    """Draws the images of one model; clean ones only once."""

    def __init__(self, pipeline: Any, settings: EvaluationSettings, seed: int, on_pass: OnPass) -> None:
        self.pipeline, self.settings, self.seed, self.on_pass = pipeline, settings, seed, on_pass
        self.clean: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

    def images(self, prompts: Sequence[str]) -> Tensor:
        return self._draw(prompts)[1]

    def clean_latents(self, prompts: tuple[str, ...]) -> Tensor:
        return self._draw_once(prompts)[0]

    def clean_images(self, prompts: tuple[str, ...]) -> Tensor:
        return self._draw_once(prompts)[1]

    def _draw_once(self, prompts: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        if prompts not in self.clean:
            self.clean[prompts] = self._draw(prompts)
        return self.clean[prompts]

    def _draw(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Latents and images."""
        latents = sample_latents(
            self.pipeline,
            prompts,
            seed=self.seed,
            steps=self.settings.steps,
            guidance=self.settings.guidance,
            precision=self.settings.precision,
            on_pass=self.on_pass,
        )
        return latents, decode(self.pipeline, latents, precision=self.settings.precision)


def diversity(images: Tensor) -> float:
    """Mean root-mean-square distance between two of N >= 2 images [N,3,H,W]."""
    flat = images.flatten(1)
    count = len(flat)
    return float(torch.pdist(flat).sum() / (count * (count - 1) / 2) / flat.shape[1] ** 0.5)


@torch.no_grad()
def noise_drift(before: Any, after: Any, prompts: Sequence[str], latents: Tensor, seed: int) -> float:
    """Mean squared difference of the noise that two pipelines predict for N clean prompts in noised latents [N,C,H,W]."""
    process = noise_schedule(before)
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(process.num_timesteps, (len(latents),), generator=generator)
    noised = process.add_noise(latents, torch.randn(latents.shape, generator=generator), t)
    total = 0.0
    for prompt, x, at in zip(prompts, noised, t, strict=True):
        noise, other = (_predict_noise(pipeline, process, prompt, x[None], at[None]) for pipeline in (before, after))
        total += float((noise - other).square().mean())
    return total / len(latents)


def _predict_noise(pipeline: Any, process: VP, prompt: str, x: Tensor, t: Tensor) -> Tensor:
    x, t = x.to(pipeline.device), t.to(pipeline.device)
    return process.to_noise(predict(pipeline.unet, x, t, encode(pipeline, [prompt])), x, t)
