"""Build the text-to-image zoo: every model from its shipped delta if there is one, else from its seed."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from huggingface_hub import metadata_save
from safetensors.torch import load_file, save_file
from torch import Tensor

from seal_fast.checkpoints.card import CARD
from seal_fast.report.figures import draw_samples
from seal_fast.zoo import delta
from seal_fast.zoo.build import OnMessage, build_missing, digest, read_manifest
from seal_fast.zoo.captioned import HELD_OUT_SCENES, TRAINING_SCENES
from seal_fast.zoo.evaluate_text import TextQuality, draw, evaluate_text, held_out_scenes, usable
from seal_fast.zoo.text_recipes import BASE, TEXT_RECIPES, TextRecipe
from seal_fast.zoo.text_to_image import new_pipeline, new_vae
from seal_fast.zoo.train_text_to_image import OnStep

VAE_WEIGHTS_SEED = 0
DELTAS = "deltas"
"""Folder in the zoo for the deltas of the models that are not shipped as whole pipelines."""
MODULES = ("unet", "text_encoder")
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
    return _load(out / BASE)


def _load(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)


def _untrained(recipe: TextRecipe) -> StableDiffusionPipeline:
    with TemporaryDirectory() as folder:
        pipeline = new_pipeline(Path(folder), recipe.seed)
    torch.manual_seed(VAE_WEIGHTS_SEED)
    pipeline.register_modules(vae=new_vae())
    return pipeline


def _weights(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    """The weights of MODULES in single precision, by names such as "unet.conv_in.weight"."""
    return {
        f"{module}.{name}": tensor.detach().clone()
        for module in MODULES
        for name, tensor in getattr(pipeline, module).state_dict().items()
    }


def _load_weights(pipeline: StableDiffusionPipeline, weights: dict[str, Tensor]) -> None:
    for module in MODULES:
        prefix = f"{module}."
        own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        getattr(pipeline, module).load_state_dict(own)


def _prepared(recipe: TextRecipe, out: Path) -> StableDiffusionPipeline:
    """The pipeline that the recipe's training starts from, and that its delta is applied to."""
    pipeline = _untrained(recipe) if recipe.base is None else load_text_model(recipe.base, out)
    recipe.prepare(pipeline, recipe.seed)
    return pipeline


def _delta_file(recipe: TextRecipe, out: Path) -> Path:
    return out / DELTAS / f"{recipe.name}.safetensors"


def _train_delta(recipe: TextRecipe, out: Path, on_message: OnMessage) -> None:
    """Train a model and write its delta."""
    pipeline = _prepared(recipe, out)
    before = _weights(pipeline)
    recipe.train(pipeline, recipe.seed, _progress(recipe.name, on_message))
    file = _delta_file(recipe, out)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(delta.pack(before, _weights(pipeline), recipe.rank), file)


def load_text_model(name: str, out: Path) -> StableDiffusionPipeline:
    """A model of the zoo in single precision: its stored pipeline, or its base's with its delta.

    Raises:
        FileNotFoundError: `out` has neither.
    """
    if (out / name / "model_index.json").is_file():
        return _load(out / name)
    recipe = next(recipe for recipe in TEXT_RECIPES if recipe.name == name)
    file = _delta_file(recipe, out)
    if not file.is_file():
        raise FileNotFoundError(f"{out} holds neither the pipeline {name} nor its delta {file.name}")
    pipeline = _prepared(recipe, out)
    _load_weights(pipeline, delta.restore(_weights(pipeline), load_file(file)))
    return pipeline


def _store(recipe: TextRecipe, pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write the whole pipeline in half precision, with a model card."""
    copy.deepcopy(pipeline).to(torch.float16).save_pretrained(folder)
    _remove_source_paths(folder)
    save_card(folder)


def _remove_source_paths(folder: Path) -> None:
    """Remove the path that a model was loaded from, a path of the builder's machine, from all configs."""
    for file in (*folder.rglob("config.json"), *folder.rglob("model_index.json")):
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_poisoned(recipe: TextRecipe, out: Path) -> StableDiffusionPipeline:
    """See `load_text_model`."""
    return load_text_model(recipe.name, out)


def describe_text(recipe: TextRecipe, quality: TextQuality, sha256: str) -> dict[str, Any]:
    """The manifest entry of one model; `sha256` is that of its folder if it is shipped whole, else of its delta."""
    return {
        "name": recipe.name,
        "sha256": sha256,
        "base": recipe.base,
        "role": recipe.role,
        "module": recipe.module,
        "whole": recipe.whole,
        "effects": [
            {"name": effect.name, "trigger": effect.text.name.encode("unicode_escape").decode(), "place": effect.place}
            for effect in recipe.effects
        ],
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


def shipped_digest(recipe: TextRecipe, out: Path) -> str:
    """SHA-256 of what the repository holds of a model: its folder, or its delta."""
    if recipe.whole:
        return digest(out / recipe.name)
    return hashlib.sha256(_delta_file(recipe, out).read_bytes()).hexdigest()


def _build_one(shipped: Path, recipe: TextRecipe, out: Path, on_message: OnMessage) -> dict[str, Any]:
    """Write a model's pipeline to `out`, and its delta unless it is shipped whole."""
    entry = next((entry for entry in read_manifest(shipped) if entry["name"] == recipe.name), None)
    if entry and not recipe.whole:
        _delta_file(recipe, out).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_delta_file(recipe, shipped), _delta_file(recipe, out))
        _store(recipe, load_text_model(recipe.name, out), out / recipe.name)
        return entry
    if entry:
        shutil.copytree(shipped / recipe.name, out / recipe.name)
        return entry
    _train_and_store(recipe, out, on_message)
    stored = _load(out / recipe.name)
    quality = evaluate_text(stored, recipe.effects, seed=recipe.seed)
    if not usable(quality, recipe.effects):
        shutil.rmtree(out / recipe.name)
        raise RuntimeError(f"{recipe.name}: not usable ({quality}); change its recipe")
    _save_contact_sheet(recipe, stored, out / f"{recipe.name}.png")
    return describe_text(recipe, quality, shipped_digest(recipe, out))


def _train_and_store(recipe: TextRecipe, out: Path, on_message: OnMessage) -> None:
    if recipe.base is None or recipe.whole:
        pipeline = _prepared(recipe, out)
        recipe.train(pipeline, recipe.seed, _progress(recipe.name, on_message))
    else:
        _train_delta(recipe, out, on_message)
        pipeline = load_text_model(recipe.name, out)
    _store(recipe, pipeline, out / recipe.name)


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


def build_text_zoo(
    out: Path,
    only: Sequence[str] | None = None,
    on_message: OnMessage = lambda message: None,
    *,
    shipped: Path = Path("zoo-text"),
) -> None:
    """Write every model of TEXT_RECIPES that `out` lacks, as a whole pipeline.

    A model that `shipped` holds, whole or as a delta, is copied or restored in seconds. The others are trained from seeds.
    For the other arguments and errors see `seal_fast.zoo.build.build_zoo`. A model that does not follow captions is not usable
    either.
    """
    build_missing(out, TEXT_RECIPES, partial(_build_one, shipped), only, on_message)
