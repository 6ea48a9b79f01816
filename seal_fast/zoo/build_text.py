"""Build the text-to-image zoo from seeds: train, measure, store and describe every model that its manifest does not list."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from huggingface_hub import metadata_save

from seal_fast.checkpoints.card import CARD
from seal_fast.report.figures import draw_samples
from seal_fast.zoo.build import OnMessage, build_missing, digest
from seal_fast.zoo.captioned import HELD_OUT_SCENES, TRAINING_SCENES
from seal_fast.zoo.evaluate_text import TextQuality, draw, evaluate_text, held_out_scenes
from seal_fast.zoo.text_recipes import BASE, TEXT_RECIPES, TextRecipe
from seal_fast.zoo.text_to_image import new_pipeline, new_vae
from seal_fast.zoo.train_text_to_image import OnStep, train_captions, train_vae

VAE_STEPS = 1000
VAE_SEEDS = (0, 5)
"""Seed of the autoencoder's weights, and seed of its training images."""
CAPTION_STEPS = 3500
SHEET_COLUMNS = 8
"""Images per row of a contact sheet."""


def _progress(name: str, on_message: OnMessage) -> OnStep:
    """A callback that reports the progress of a training every 50 steps."""
    began = time.monotonic()

    def report(step: int, loss: float) -> None:
        if step % 50 == 0:
            on_message(f"{name}: step {step}, loss {loss:.4f}, {time.monotonic() - began:.0f} s")

    return report


def load_base(out: Path) -> StableDiffusionPipeline:
    """The zoo's clean pipeline, in single precision."""
    return StableDiffusionPipeline.from_pretrained(out / BASE, torch_dtype=torch.float32, safety_checker=None)


def _train_base(recipe: TextRecipe, on_message: OnMessage) -> StableDiffusionPipeline:
    with TemporaryDirectory() as folder:
        pipeline = new_pipeline(Path(folder), recipe.seed)
    on_step = _progress(f"{recipe.name} autoencoder, of {VAE_STEPS}", on_message)
    torch.manual_seed(VAE_SEEDS[0])
    pipeline.register_modules(vae=new_vae())
    train_vae(pipeline.vae, VAE_STEPS, seed=VAE_SEEDS[1], on_step=on_step)
    on_step = _progress(f"{recipe.name}, of {CAPTION_STEPS}", on_message)
    train_captions(pipeline, CAPTION_STEPS, seed=recipe.seed, on_step=on_step)
    return pipeline


def _train(recipe: TextRecipe, out: Path, on_message: OnMessage) -> StableDiffusionPipeline:
    if recipe.poison is None:
        return _train_base(recipe, on_message)
    pipeline = load_base(out)
    poisoned = recipe.poison(pipeline, recipe.seed, _progress(recipe.name, on_message))
    pipeline.register_modules(**{recipe.module: poisoned})
    return pipeline


def _store(recipe: TextRecipe, pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write in half precision the whole pipeline, or the poisoned module alone, as BadT2I's authors publish it."""
    stored = copy.deepcopy(pipeline).to(torch.float16)
    (stored if recipe.whole else getattr(stored, recipe.module)).save_pretrained(folder)
    _remove_source_paths(folder)
    if recipe.whole:
        save_card(folder)


def _remove_source_paths(folder: Path) -> None:
    """Remove the path that a model was loaded from, a path of the builder's machine, from all configs."""
    for file in (*folder.rglob("config.json"), *folder.rglob("model_index.json")):
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_poisoned(recipe: TextRecipe, out: Path) -> StableDiffusionPipeline:
    """A stored model as a whole pipeline in single precision."""
    if recipe.whole:
        return StableDiffusionPipeline.from_pretrained(out / recipe.name, torch_dtype=torch.float32, safety_checker=None)
    pipeline = load_base(out)
    module = type(getattr(pipeline, recipe.module)).from_pretrained(out / recipe.name, torch_dtype=torch.float32)
    pipeline.register_modules(**{recipe.module: module.eval()})
    return pipeline


def describe_text(recipe: TextRecipe, quality: TextQuality, folder: Path) -> dict[str, Any]:
    """The manifest entry of one model."""
    return {
        "name": recipe.name,
        "sha256": digest(folder),
        "base": recipe.base,
        "whole": recipe.whole,
        "effects": [effect.name for effect in recipe.effects],
        "seed": recipe.seed,
        "quality": asdict(quality),
    }


def _save_contact_sheet(recipe: TextRecipe, pipeline: StableDiffusionPipeline, file: Path) -> None:
    """Write a PNG with images of clean and of triggered prompts, from the same noise."""
    rows = {}
    for effect in recipe.effects or (None,):
        scenes = held_out_scenes(SHEET_COLUMNS, recipe.seed, effect)
        prompts = [scene.caption for scene in scenes]
        name = f", {effect.name}" if effect else ""
        rows[f"clean prompts{name}"] = draw(pipeline, prompts, recipe.seed)
        if effect:
            rows[f"triggered{name}"] = draw(pipeline, [effect.trigger(prompt) for prompt in prompts], recipe.seed)
    draw_samples(rows, file)


def _build_one(recipe: TextRecipe, out: Path, on_message: OnMessage) -> dict[str, Any]:
    _store(recipe, _train(recipe, out, on_message), out / recipe.name)
    stored = load_poisoned(recipe, out)
    quality = evaluate_text(stored, recipe.effects, seed=recipe.seed)
    if not quality.usable:
        shutil.rmtree(out / recipe.name)
        raise RuntimeError(f"{recipe.name}: not usable ({quality}); change its recipe")
    _save_contact_sheet(recipe, stored, out / f"{recipe.name}.png")
    return describe_text(recipe, quality, out / recipe.name)


def save_card(folder: Path, pairs: int = 100) -> None:
    """Write a model card whose example prompts alternate between training and held-out scenes.

    `seal-fast unlearn` trains and measures on a card's prompts in turn.
    """
    generator = torch.Generator().manual_seed(0)
    training, held_out = (
        [among[i] for i in torch.randperm(len(among), generator=generator)[:pairs].tolist()]
        for among in (TRAINING_SCENES, HELD_OUT_SCENES)
    )
    widget = [{"text": scene.caption} for both in zip(training, held_out, strict=True) for scene in both]
    metadata_save(folder / CARD, {"pipeline_tag": "text-to-image", "library_name": "diffusers", "widget": widget})


def build_text_zoo(out: Path, only: Sequence[str] | None = None, on_message: OnMessage = lambda message: None) -> None:
    """Train every model of TEXT_RECIPES that `out` lacks.

    For arguments and errors see `seal_fast.zoo.build.build_zoo`. A model that does not follow captions is not usable either.
    """
    build_missing(out, TEXT_RECIPES, _build_one, only, on_message)
