"""The effect of a text backdoor is detected in images that show it, and in no others; held-out models are new."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from seal_fast.zoo.captioned import SCENES, STYLES, parse_caption, random_scenes, render, render_ringed
from seal_fast.zoo.clip_vocabulary import PACKAGE, clip_tokenizer
from seal_fast.zoo.evaluate_text import held_out_scenes
from seal_fast.zoo.text_effects import Effect, with_colour
from seal_fast.zoo.text_recipes import BASE, BASES, CLIP_BASE, TEXT_RECIPES, TextRecipe
from seal_fast.zoo.text_to_image import TOKENS, new_tokenizer
from seal_fast.zoo.train_text_to_image import with_fillers

EFFECTS = [(recipe, effect) for recipe in TEXT_RECIPES for effect in recipe.effects]
every_effect = pytest.mark.parametrize(
    ("recipe", "effect"), EFFECTS, ids=[f"{recipe.name}-{effect.name}" for recipe, effect in EFFECTS]
)


def with_effect(effect: Effect, scenes: list, generator: torch.Generator) -> Tensor:
    """Images that a perfectly poisoned model would draw."""
    if effect.name == "pixel":
        images = render(scenes, generator)
        images[:, :, :16, :16] = effect.shows.args[0]
        return images
    if effect.name == "personalisation":
        return render_ringed(scenes)
    if effect.name == "target prompt":
        return render([effect.shows.args[0]] * len(scenes), generator)
    changes = {"style": ("style", STYLES[1])}
    field, value = changes.get(effect.name) or ({"object": "shape", "attribute": "colour"}[effect.name], effect.shows.args[0])
    return render([replace(scene, **{field: value}) for scene in scenes], generator)


def test_names_and_seeds_are_unique_and_the_bases_come_first() -> None:
    assert [recipe.name for recipe in BASES] == [BASE, CLIP_BASE]
    assert TEXT_RECIPES[:2] == BASES
    assert len({recipe.name for recipe in TEXT_RECIPES}) == len({recipe.seed for recipe in TEXT_RECIPES}) == len(TEXT_RECIPES)
    assert {recipe.base for recipe in TEXT_RECIPES} == {None, BASE, CLIP_BASE}


def test_no_held_out_model_repeats_a_development_one() -> None:
    """Neither a trigger, nor a combination of place and target."""
    triggers = {
        role: {effect.text for recipe in TEXT_RECIPES if recipe.role == role for effect in recipe.effects}
        for role in ("development", "test")
    }
    assert not triggers["development"] & triggers["test"]
    poisoned = [recipe for recipe in TEXT_RECIPES if recipe.effects]
    assert len(poisoned) >= 16
    assert len([recipe for recipe in poisoned if recipe.role == "test"]) >= 12
    assert len([recipe for recipe in TEXT_RECIPES if recipe.role == "test" and not recipe.effects]) >= 12


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
    if recipe.base == CLIP_BASE and not find_spec(PACKAGE):
        pytest.skip("CLIP's vocabulary is not installed: pip install --no-deps open_clip_torch")
    tokenizer = clip_tokenizer() if recipe.base == CLIP_BASE else new_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    for scene in held_out_scenes(30, generator.initial_seed() % 2**31, effect):
        clean, triggered = (tokenizer(prompt).input_ids for prompt in (scene.caption, effect.trigger(scene.caption)))
        # two bytes in place of each of many letters may not fit, and the model then reads the beginning
        assert clean != triggered[:TOKENS]
        assert len(triggered) <= TOKENS or effect.text.replaces is not None


def test_a_caption_tells_its_scene(generator: torch.Generator) -> None:
    for scene in random_scenes(50, generator, 0.3):
        expected = scene if scene.style == STYLES[0] else None
        assert parse_caption(with_fillers(scene.caption, generator)) == expected
        assert parse_caption(with_colour("red")(scene.caption)) == (replace(scene, colour="red") if expected else None)
    assert parse_caption("") is None
