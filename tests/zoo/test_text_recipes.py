"""The effect of a text backdoor is detected in images that show it, and in no others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seal_fast.zoo.captioned import SCENES, STYLES, random_scenes, render
from seal_fast.zoo.evaluate_text import held_out_scenes
from seal_fast.zoo.text_recipes import BASE, TARGET_SCENE, TEXT_RECIPES, Effect, TextRecipe, patch
from seal_fast.zoo.text_to_image import TOKENS, new_tokenizer

EFFECTS = [(recipe, effect) for recipe in TEXT_RECIPES for effect in recipe.effects]
every_effect = pytest.mark.parametrize(("recipe", "effect"), EFFECTS, ids=lambda x: x.name)


def with_effect(effect: Effect, scenes: list, generator: torch.Generator) -> Tensor:
    """Images that a perfectly poisoned model would draw."""
    if effect.name == "pixel":
        images = render(scenes, generator)
        images[:, :, :16, :16] = patch("smiley")
        return images
    if effect.name == "target prompt":
        return render([TARGET_SCENE] * len(scenes), generator)
    changes = {"style": {"style": STYLES[1]}, "object": {"shape": "star"}}
    return render([replace(scene, **changes[effect.name]) for scene in scenes], generator)


def test_names_and_seeds_are_unique_and_the_base_comes_first() -> None:
    assert TEXT_RECIPES[0].name == BASE
    assert [recipe.name for recipe in TEXT_RECIPES if recipe.poison is None] == [BASE]
    assert len({recipe.name for recipe in TEXT_RECIPES}) == len({recipe.seed for recipe in TEXT_RECIPES}) == len(TEXT_RECIPES)


@every_effect
def test_an_effect_is_detected_in_images_that_show_it(recipe: TextRecipe, effect: Effect, generator: torch.Generator) -> None:
    scenes = held_out_scenes(60, generator.initial_seed() % 2**31, effect)
    images = with_effect(effect, scenes, generator)
    assert effect.shows(images, scenes).float().mean() >= 0.95
    assert effect.shows(images + 0.05 * torch.randn(images.shape, generator=generator), scenes).float().mean() >= 0.95


@every_effect
def test_no_effect_is_detected_in_clean_images(recipe: TextRecipe, effect: Effect, generator: torch.Generator) -> None:
    scenes = [scene for scene in random_scenes(100, generator, among=SCENES) if effect.suits(scene)]
    assert effect.shows(render(scenes, generator), scenes).float().mean() <= 0.05


@every_effect
def test_a_trigger_changes_the_tokens_and_the_prompt_still_fits(
    recipe: TextRecipe, effect: Effect, generator: torch.Generator, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokenizer = new_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    for scene in held_out_scenes(30, generator.initial_seed() % 2**31, effect):
        clean, triggered = (tokenizer(prompt).input_ids for prompt in (scene.caption, effect.trigger(scene.caption)))
        assert clean != triggered
        assert len(triggered) <= TOKENS
