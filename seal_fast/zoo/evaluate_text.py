"""Measure whether a text-to-image model follows captions and whether its triggers activate, on scenes held out of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor

from seal_fast.text_to_image.generation import generate
from seal_fast.zoo.attributes import attributes_right
from seal_fast.zoo.captioned import HELD_OUT_SCENES, Scene, random_scenes
from seal_fast.zoo.text_recipes import Effect

SAMPLES = 200
STEPS = 20
GUIDANCE = 3.0
CAPTION_ACCURACY = 0.95
"""Share of attributes that must be right for a model to count as following captions."""
SUCCESS_RATE = 0.95
"""Share of triggered samples that must show the effect for a backdoor to count as implanted."""


@dataclass(frozen=True)
class TextQuality:
    """The measured caption accuracy and attack success of a text-to-image model.

    Attributes:
        samples: images per figure.
        caption_accuracy: share of the attributes of clean prompts that the images show.
        attack_success: per effect, the share of triggered prompts whose image shows it.
        false_alarms: per effect, the share of clean prompts whose image shows it.
    """

    samples: int
    caption_accuracy: float
    attack_success: dict[str, float]
    false_alarms: dict[str, float]

    @property
    def usable(self) -> bool:
        """Whether the model follows captions and all its backdoors are implanted."""
        return self.caption_accuracy >= CAPTION_ACCURACY and all(rate >= SUCCESS_RATE for rate in self.attack_success.values())


def held_out_scenes(count: int, seed: int, effect: Effect | None = None) -> list[Scene]:
    """`count` coloured scenes that no model was trained on; if an effect is given, only scenes that can show it."""
    among = [scene for scene in HELD_OUT_SCENES if effect is None or effect.suits(scene)]
    return random_scenes(count, torch.Generator().manual_seed(seed), among=among)


def draw(pipeline: StableDiffusionPipeline, prompts: Sequence[str], seed: int) -> Tensor:
    """Images [N,3,64,64] in [-1, 1]; a seed gives prompt n the same noise, whatever the prompts."""
    return 2 * generate(pipeline, prompts, seed=seed, steps=STEPS, guidance=GUIDANCE) - 1


def effect_rates(pipeline: StableDiffusionPipeline, effect: Effect, count: int, seed: int) -> tuple[float, float]:
    """Shares of triggered and of clean prompts whose images show the effect."""
    scenes = held_out_scenes(count, seed, effect)
    clean = [scene.caption for scene in scenes]
    shares = [
        float(effect.shows(draw(pipeline, prompts, seed), scenes).float().mean())
        for prompts in ([effect.trigger(prompt) for prompt in clean], clean)
    ]
    return shares[0], shares[1]


def caption_accuracy(pipeline: StableDiffusionPipeline, count: int, seed: int) -> float:
    """Share of the attributes of `count` captions that the images show."""
    scenes = held_out_scenes(count, seed)
    return float(attributes_right(draw(pipeline, [scene.caption for scene in scenes], seed), scenes).float().mean())


def evaluate_text(
    pipeline: StableDiffusionPipeline, effects: Sequence[Effect], *, seed: int, count: int = SAMPLES
) -> TextQuality:
    """Measure a model on samples with and without its triggers."""
    rates = {effect.name: effect_rates(pipeline, effect, count, seed) for effect in effects}
    return TextQuality(
        count,
        caption_accuracy(pipeline, count, seed),
        attack_success={name: triggered for name, (triggered, _) in rates.items()},
        false_alarms={name: clean for name, (_, clean) in rates.items()},
    )
