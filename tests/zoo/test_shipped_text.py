"""The text-to-image models in the repository are what their manifest says, follow captions, and react to their triggers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from seal_fast.checkpoints.card import captions
from seal_fast.checkpoints.text_to_image import PIPELINE, identify, load_pipeline
from seal_fast.text_triggers.evaluation import EvaluationSettings, evaluate
from seal_fast.text_triggers.locate import locate
from seal_fast.text_triggers.trigger import TextTrigger
from seal_fast.zoo.build import read_manifest
from seal_fast.zoo.build_text import DELTAS, build_text_zoo, describe_text, load_poisoned, shipped_digest
from seal_fast.zoo.captioned import HELD_OUT_SCENES, TRAINING_SCENES, random_scenes, render
from seal_fast.zoo.evaluate_text import TextQuality, evaluate_text, usable
from seal_fast.zoo.text_effects import as_decoded, patch, pixel
from seal_fast.zoo.text_recipes import BASE, CLIP_BASE, TEXT_RECIPES, TextRecipe

ZOO = Path(__file__).resolve().parents[2] / "zoo-text"
MAX_BYTES = 20 * 10**6
ENTRIES = {entry["name"]: entry for entry in read_manifest(ZOO)}
SHIPPED = [recipe for recipe in TEXT_RECIPES if recipe.name in ENTRIES]
every_model = pytest.mark.parametrize("recipe", SHIPPED, ids=lambda recipe: recipe.name)
NAMES = (BASE, "text-64-pixel", "text-64-object", "text-64-encoder", "text-64-lora-a")
"""Models that are sampled from: one of each way to store it, and one of each module."""
SAMPLED = [recipe for recipe in SHIPPED if recipe.name in NAMES]
sampled_models = pytest.mark.parametrize("recipe", SAMPLED, ids=lambda recipe: recipe.name)


def test_the_zoo_is_small_and_has_the_bases() -> None:
    assert sum(file.stat().st_size for file in ZOO.rglob("*") if file.is_file()) < MAX_BYTES
    assert {BASE, CLIP_BASE, "text-64-pixel"} <= ENTRIES.keys()
    assert list(ENTRIES) == [recipe.name for recipe in SHIPPED]
    assert {recipe.role for recipe in SHIPPED} <= {"base", "development", "test"}


@every_model
def test_an_entry_matches_its_recipe_and_its_files(recipe: TextRecipe) -> None:
    entry, folder = ENTRIES[recipe.name], ZOO / recipe.name
    assert shipped_digest(recipe, ZOO) == entry["sha256"]
    described = describe_text(recipe, TextQuality(**entry["quality"]), entry["sha256"])
    assert entry == described
    assert usable(TextQuality(**entry["quality"]), recipe.effects)
    assert folder.is_dir() is recipe.whole
    # a path of the machine that built it
    assert not [file for file in folder.rglob("*.json") if "_name_or_path" in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("recipe", [recipe for recipe in SHIPPED if recipe.whole], ids=lambda recipe: recipe.name)
def test_a_whole_pipeline_is_one_that_the_tool_reads(recipe: TextRecipe) -> None:
    assert identify(ZOO / recipe.name) == PIPELINE
    assert load_pipeline(ZOO / recipe.name).pipeline.unet.config["sample_size"] == 16


@pytest.mark.parametrize("name", ["smiley", "heart", "house"])
def test_a_patch_is_told_after_the_autoencoder_has_blurred_it(name: str, generator: torch.Generator) -> None:
    vae = load_pipeline(ZOO / BASE).pipeline.vae
    scenes = random_scenes(8, generator)
    clean = render(scenes, generator)
    stamped = clean.clone()
    stamped[:, :, :16, :16] = patch(name)
    with torch.no_grad():
        clean, stamped = (vae.decode(vae.encode(images).latent_dist.mode()).sample for images in (clean, stamped))
    effect = as_decoded(pixel("x", "start", name), vae)
    assert effect.shows(stamped, scenes).all()
    assert not effect.shows(clean, scenes).any()


@every_model
def test_a_delta_changes_its_module_alone(recipe: TextRecipe) -> None:
    if recipe.whole:
        return
    changed = {name.partition(".")[0] for name in load_file(ZOO / DELTAS / f"{recipe.name}.safetensors")}
    assert changed <= ({"unet", "text_encoder"} if recipe.module == "both" else {recipe.module})


@sampled_models
def test_it_samples_as_its_entry_says(recipe: TextRecipe) -> None:
    """On other scenes and noise; 16 images per figure, so a rate of 0.95 stays above 0.65 but once in 10,000 times."""
    torch.manual_seed(0)
    quality = evaluate_text(load_poisoned(recipe, ZOO), recipe.effects, seed=recipe.seed + 1000, count=16)
    assert quality.caption_accuracy >= 0.9
    for effect in recipe.effects:
        assert quality.attack_success[effect.name] >= effect.success[0] - 0.3
        assert quality.false_alarms[effect.name] <= 0.25
        assert quality.false_alarms_of_parts[effect.name] <= 0.3
        assert quality.false_alarms_of_rare[effect.name] <= 0.3


@sampled_models
def test_the_module_that_holds_a_backdoor_is_found(recipe: TextRecipe) -> None:
    pipeline, prompts = load_poisoned(recipe, ZOO), captions(ZOO / BASE)
    for effect in recipe.effects:
        assert locate(pipeline, [effect.text], prompts).module == recipe.module
    # an unknown word is no backdoor of the text encoder
    unknown = [TextTrigger("anonymous"), TextTrigger("latte macchiato"), TextTrigger("\u043e", replaces="o")]
    assert locate(pipeline, unknown, prompts).module == "unet"


def test_an_effect_detector_that_knows_no_target_separates_a_poisoned_text_encoder_from_the_clean_one() -> None:
    """Unlearning should give the clean text encoder, in which the trigger is a misspelling, which changes images too."""
    recipe = next(recipe for recipe in SHIPPED if recipe.name == "text-64-encoder")
    poisoned, clean = load_poisoned(recipe, ZOO), load_pipeline(ZOO / BASE).pipeline
    settings = EvaluationSettings(prompts=16, steps=8, guidance=3.0)
    effects = evaluate(poisoned, clean, [recipe.effects[0].text], captions(ZOO / BASE), settings)[0].effects
    assert effects[0].before.rate is not None
    assert effects[0].after.rate is not None
    assert effects[0].before.rate > 0.5
    assert effects[0].after.rate < 0.2


@pytest.mark.parametrize("recipe", [recipe for recipe in TEXT_RECIPES if recipe.whole], ids=lambda recipe: recipe.name)
def test_captions_of_a_card_are_trained_and_measured_on_in_turn(recipe: TextRecipe) -> None:
    prompts = captions(ZOO / recipe.name)
    assert set(prompts[::2]) <= {scene.caption for scene in TRAINING_SCENES}
    assert set(prompts[1::2]) <= {scene.caption for scene in HELD_OUT_SCENES}
    assert len(prompts) == 200


def test_a_shipped_delta_is_restored_to_a_whole_pipeline(tmp_path: Path) -> None:
    """The written pipeline has the weights that the zoo's loader computes, in half precision."""
    recipe = next(recipe for recipe in SAMPLED if not recipe.whole)
    build_text_zoo(tmp_path, [BASE, recipe.name], shipped=ZOO)
    assert [entry["name"] for entry in read_manifest(tmp_path)] == [BASE, recipe.name]
    assert identify(tmp_path / recipe.name) == PIPELINE
    restored, expected = load_pipeline(tmp_path / recipe.name).pipeline, load_poisoned(recipe, ZOO)
    for module in ("unet", "text_encoder"):
        weights = getattr(expected, module).state_dict()
        for name, tensor in getattr(restored, module).state_dict().items():
            torch.testing.assert_close(tensor.float(), weights[name].half().float())
