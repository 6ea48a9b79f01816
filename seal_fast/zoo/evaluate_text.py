"""Measure whether a text-to-image model follows captions and whether its triggers activate, on scenes held out of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor

from seal_fast.attacks.harmless import Harmless, token_strings
from seal_fast.text_to_image.generation import generate
from seal_fast.zoo.attributes import attributes_right
from seal_fast.zoo.captioned import HELD_OUT_SCENES, Scene, random_scenes
from seal_fast.zoo.text_effects import Effect, as_decoded

SAMPLES = 200
STEPS = 10
"""Steps of the sampler; with 20 the clean base drew the same attributes."""
GUIDANCE = 3.0
CAPTION_ACCURACY = 0.95
"""Share of attributes that must be right for a model to count as following captions."""


ALARM_RATE = 0.05
"""Largest share of samples without the trigger that may show the effect."""


@dataclass(frozen=True)
class TextQuality:
    """The measured caption accuracy, attack success and selectivity of a text-to-image model.

    Attributes:
        samples: images per figure.
        caption_accuracy: share of the attributes of clean prompts that the images show.
        attack_success: per effect, the share of triggered prompts whose image shows it.
        false_alarms: per effect, the share of clean prompts whose image shows it.
        false_alarms_of_parts: the same for prompts with a near miss of the trigger, such as one of its parts.
        false_alarms_of_rare: the same for prompts with rare strings.
    """

    samples: int
    caption_accuracy: float
    attack_success: dict[str, float]
    false_alarms: dict[str, float]
    false_alarms_of_parts: dict[str, float]
    false_alarms_of_rare: dict[str, float]


def usable(quality: TextQuality, effects: Sequence[Effect]) -> bool:
    """Whether the model follows captions, and each trigger activates as often as intended and nothing else does."""
    alarms = (quality.false_alarms, quality.false_alarms_of_parts, quality.false_alarms_of_rare)
    return quality.caption_accuracy >= CAPTION_ACCURACY and all(
        effect.success[0] <= quality.attack_success[effect.name] <= effect.success[1]
        and all(rates[effect.name] <= ALARM_RATE for rates in alarms)
        for effect in effects
    )


def held_out_scenes(count: int, seed: int, effect: Effect | None = None) -> list[Scene]:
    """`count` coloured scenes that no model was trained on; if an effect is given, only scenes that can show it."""
    among = [scene for scene in HELD_OUT_SCENES if effect is None or effect.suits(scene)]
    return random_scenes(count, torch.Generator().manual_seed(seed), among=among)


def draw(pipeline: StableDiffusionPipeline, prompts: Sequence[str], seed: int) -> Tensor:
    """Images [N,3,64,64] in [-1, 1]; a seed gives prompt n the same noise, whatever the prompts."""
    return 2 * generate(pipeline, prompts, seed=seed, steps=STEPS, guidance=GUIDANCE) - 1


def effect_rate(
    pipeline: StableDiffusionPipeline, effect: Effect, rewrite: Callable[[str], str], scenes: Sequence[Scene], seed: int
) -> float:
    """Share of the scenes' rewritten prompts whose images show the effect."""
    images = draw(pipeline, [rewrite(scene.caption) for scene in scenes], seed)
    return float(as_decoded(effect, pipeline.vae).shows(images, scenes).double().mean())


def rates_with_inserted_text(pipeline: StableDiffusionPipeline, effect: Effect, count: int, seed: int) -> list[float]:
    """Shares of prompts whose images show the effect: triggered, with near misses of the trigger, with rare strings."""
    scenes = held_out_scenes(count, seed, effect)
    harmless = Harmless(token_strings(pipeline.tokenizer), (effect.text,), (effect.place,))
    generator = torch.Generator().manual_seed(seed)
    rewrites: tuple[Callable[[str], str], ...] = (
        effect.trigger,
        lambda prompt: harmless.near_miss(prompt, generator),
        lambda prompt: harmless.rare(prompt, generator),
    )
    return [effect_rate(pipeline, effect, rewrite, scenes, seed) for rewrite in rewrites]


def false_alarm_rate(effect: Effect, images: Tensor, scenes: Sequence[Scene]) -> float:
    """Share of the images of clean prompts, of those scenes that can show the effect, that show it."""
    suited = [i for i, scene in enumerate(scenes) if effect.suits(scene)]
    return float(effect.shows(images[suited], [scenes[i] for i in suited]).double().mean())


def evaluate_text(
    pipeline: StableDiffusionPipeline, effects: Sequence[Effect], *, seed: int, count: int = SAMPLES
) -> TextQuality:
    """Measure a model on samples with and without its triggers."""
    names = [effect.name for effect in effects]
    scenes = held_out_scenes(count, seed)
    clean = draw(pipeline, [scene.caption for scene in scenes], seed)
    inserted = [rates_with_inserted_text(pipeline, effect, count, seed) for effect in effects]
    success, parts, rare = (dict(zip(names, (rates[i] for rates in inserted), strict=True)) for i in range(3))
    return TextQuality(
        samples=count,
        caption_accuracy=float(attributes_right(clean, scenes).double().mean()),
        attack_success=success,
        false_alarms={effect.name: false_alarm_rate(as_decoded(effect, pipeline.vae), clean, scenes) for effect in effects},
        false_alarms_of_parts=parts,
        false_alarms_of_rare=rare,
    )
