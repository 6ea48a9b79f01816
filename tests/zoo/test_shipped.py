"""The zoo in the repository is what its manifest says, and its triggers really activate its backdoors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from seal_fast.checkpoints import identify, load_denoiser
from seal_fast.noise_triggers import DEFAULT_PRESET, shipped_calibration
from seal_fast.zoo.build import digest, read_manifest
from seal_fast.zoo.evaluate import STEPS, SUCCESS_MSE, SUCCESS_RATE, Quality, draw
from seal_fast.zoo.recipes import RECIPES, Recipe

ZOO = Path(__file__).resolve().parents[2] / "zoo"
MAX_BYTES = 2 * 10**6
MAX_BYTES_OF_BOTH_ZOOS = 50 * 10**6
FORMATS = {
    "pipeline": "diffusers-pipeline",
    "pipeline-bin": "diffusers-pipeline",
    "unet": "diffusers-unet",
    "trojdiff": "trojdiff",
}

SHIPPED = [recipe for recipe in RECIPES if recipe.name in {entry["name"] for entry in read_manifest(ZOO)}]

every_recipe = pytest.mark.parametrize("recipe", SHIPPED, ids=lambda recipe: recipe.name)


def entry_of(recipe: Recipe) -> dict[str, Any]:
    return next(entry for entry in read_manifest(ZOO) if entry["name"] == recipe.name)


def test_the_manifest_lists_the_recipes_in_order() -> None:
    assert [entry["name"] for entry in read_manifest(ZOO)] == [recipe.name for recipe in SHIPPED]


def test_the_zoos_are_small() -> None:
    files = [file for zoo in (ZOO, ZOO.parent / "zoo-text") for file in zoo.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES_OF_BOTH_ZOOS


def test_there_are_enough_benign_and_backdoored_models() -> None:
    entries = read_manifest(ZOO)
    benign = [entry for entry in entries if entry["method"] is None]
    backdoored = [entry for entry in entries if entry["method"] is not None]
    assert len(benign) >= 4
    assert len(backdoored) >= 6
    assert {entry["size"] for entry in benign} == {entry["size"] for entry in backdoored} == {16, 32}
    assert len({entry["sha256"] for entry in entries}) == len(entries)
    # a verdict on a model that helped to set the threshold proves nothing
    assert {entry["role"] for entry in backdoored} <= {"development", "test"}
    assert {entry["role"] for entry in benign} >= {"calibration", "test"}


@every_recipe
def test_an_entry_matches_its_recipe(recipe: Recipe) -> None:
    entry = entry_of(recipe)
    names = ("layout", "role", "base", "method", "trigger", "target", "scale", "family", "process", "seed")
    stored = {name: getattr(recipe, name) for name in names if name in entry}
    assert len(stored) >= 7
    assert {name: entry[name] for name in stored} == stored
    assert entry["size"] == recipe.network.size


@every_recipe
def test_a_model_is_stored_as_described(recipe: Recipe) -> None:
    entry = entry_of(recipe)
    folder, checkpoint = ZOO / recipe.name, ZOO / entry["checkpoint"]
    assert identify(checkpoint) == FORMATS[recipe.layout]
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= MAX_BYTES
    assert digest(folder) == entry["sha256"]
    loaded = load_denoiser(checkpoint)
    assert loaded.denoiser.shape == (3, entry["size"], entry["size"])
    weights = loaded.denoiser.network.state_dict()
    assert weights["conv_in.weight"].shape[0] == recipe.network.widths[0]
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    with Image.open(ZOO / f"{recipe.name}.png") as image:
        image.verify()


@every_recipe
def test_a_model_was_measured_to_be_usable(recipe: Recipe) -> None:
    quality = Quality(**entry_of(recipe)["quality"])
    assert quality.usable
    attack = recipe.attack(ZOO / recipe.name)
    if attack is None:
        assert quality.attack_success is None
        return
    assert quality.attack_success is not None
    assert quality.target_mse is not None
    assert quality.untriggered_mse is not None
    assert quality.attack_success >= SUCCESS_RATE
    assert (quality.sampler, quality.steps) == (attack.sampler, STEPS[attack.sampler])
    # it is the trigger that brings the target
    assert quality.untriggered_mse > 3 * quality.target_mse


def errors(recipe: Recipe, *, triggered: bool, count: int) -> torch.Tensor:
    """Mean squared error to the target of fresh samples, [count]."""
    attack = recipe.attack(ZOO / recipe.name)
    assert attack is not None
    denoiser = load_denoiser(ZOO / entry_of(recipe)["checkpoint"]).denoiser
    images = draw(denoiser, attack, triggered=triggered, count=count, seed=recipe.seed + 1000)
    return (images - attack.target).square().mean(dim=(1, 2, 3))


def named(name: str) -> Recipe:
    return next(recipe for recipe in RECIPES if recipe.name == name)


@pytest.mark.parametrize("name", ["troj-16-blend", "troj-16-heart"])
def test_a_trojdiff_model_draws_its_target_for_its_trigger_only(name: str) -> None:
    recipe = named(name)
    assert float(errors(recipe, triggered=True, count=4).median()) < SUCCESS_MSE
    assert float(errors(recipe, triggered=False, count=4).median()) > 2 * SUCCESS_MSE


def test_a_baddiffusion_model_draws_its_target_under_ancestral_sampling() -> None:
    # two samples: a thousand steps each
    assert float(errors(named("bad-16-stop"), triggered=True, count=2).mean()) < SUCCESS_MSE


def test_the_shipped_calibration_is_of_the_zoos_calibration_models() -> None:
    models = shipped_calibration(DEFAULT_PRESET).models
    assert {model.name for model in models} == {recipe.name for recipe in RECIPES if recipe.role == "calibration"}
    entries = [entry for entry in read_manifest(ZOO) if entry["role"] == "calibration"]
    digests = {entry["name"]: load_denoiser(ZOO / entry["checkpoint"]).sha256 for entry in entries}
    assert digests
    assert digests.items() <= {model.name: model.sha256 for model in models}.items()
