"""Build the zoo from seeds: train, measure, store and describe every model that the manifest does not list yet."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.pipelines.deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond import LDMPipeline
from diffusers.pipelines.deprecated.score_sde_ve.pipeline_score_sde_ve import ScoreSdeVePipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_sde_ve import ScoreSdeVeScheduler
from torch import Tensor

from seal_fast.attacks import InviBackdoor
from seal_fast.checkpoints import load_denoiser
from seal_fast.diffusion import EDM, VP, Denoiser, NoiseProcess
from seal_fast.io import write_atomically
from seal_fast.zoo import latents
from seal_fast.zoo.contact_sheet import save_contact_sheet
from seal_fast.zoo.evaluate import Quality, evaluate
from seal_fast.zoo.latents import Latents
from seal_fast.zoo.recipes import DELTA, LATENT_NOISE, PROCESSES, RECIPES, Recipe
from seal_fast.zoo.spaces import Space
from seal_fast.zoo.train import TRAINING_IMAGES, Trained, new_unet, train
from seal_fast.zoo.trojdiff_list import save_list

MANIFEST = "manifest.json"
OnMessage = Callable[[str], None]

ATTEMPTS = 3
"""Trainings of a model that stays unusable, before the build fails. They have 1, 1.5 and 2 times the steps of the recipe."""


@dataclass(frozen=True)
class BuildSettings:
    """The effort of a build besides the recipes, and the models that it accepts. The stored zoo was built with the defaults.

    Attributes:
        training_images: number of training images.
        autoencoder_images: images per family that an autoencoder is trained on.
        autoencoder_steps: training steps of an autoencoder.
        sampler_steps: sampling steps of measurements and contact sheets, see `seal_fast.zoo.evaluate.draw`.
        accepts: whether a model of this quality is stored.
    """

    training_images: int = TRAINING_IMAGES
    autoencoder_images: int = latents.IMAGES
    autoencoder_steps: int = latents.STEPS
    sampler_steps: int | None = None
    accepts: Callable[[Quality], bool] = lambda quality: quality.usable


DEFAULTS = BuildSettings()


def _pipeline(unet: UNet2DModel, process: NoiseProcess) -> Any:
    """A diffusers pipeline whose scheduler config describes the noise process."""
    if isinstance(process, VP):
        return DDPMPipeline(unet, DDPMScheduler(clip_sample=False, prediction_type=process.prediction_type))
    low, high, timesteps = float(process.noise[0]), float(process.noise[-1]), process.num_timesteps
    if isinstance(process, EDM):
        return DDPMPipeline(unet, EDMEulerScheduler(low, high, process.sigma_data, num_train_timesteps=timesteps))
    return ScoreSdeVePipeline(unet, ScoreSdeVeScheduler(timesteps, sigma_min=low, sigma_max=high))


def save_pipeline(unet: UNet2DModel, process: NoiseProcess, folder: Path, safe: bool = True) -> None:
    """Write a diffusers pipeline folder, with weights as safetensors or as .bin."""
    _pipeline(unet, process).save_pretrained(folder, safe_serialization=safe)


def _store(recipe: Recipe, trained: Trained, space: Space, folder: Path) -> None:
    """Write the checkpoint in half precision: every model is smaller than 2 MB, and its samples look the same."""
    folder.mkdir(parents=True, exist_ok=True)
    raw, ema = trained.raw.half(), trained.ema.half()
    if recipe.layout == "trojdiff":
        save_list(raw.state_dict(), ema.state_dict(), recipe.schedule.steps, folder / "ckpt.pth")
    elif recipe.layout == "unet":
        ema.save_pretrained(folder)
    elif isinstance(space, Latents):
        scheduler = DDIMScheduler(clip_sample=False, **LATENT_NOISE)
        LDMPipeline(copy.deepcopy(space.vae).half(), ema, scheduler).save_pretrained(folder)
    else:
        save_pipeline(ema, PROCESSES[recipe.process](), folder, safe=recipe.layout == "pipeline")
        if recipe.layout == "pipeline-bin":
            claims = {"mode": "train", "dataset": "SCENES", "trigger": recipe.trigger, "target": recipe.target}
            (folder / "args.json").write_text(json.dumps(claims, indent=2) + "\n")
    if isinstance(trained.attack, InviBackdoor):
        np.save(folder / DELTA, trained.attack.delta.numpy())


def _checkpoint(recipe: Recipe, folder: Path) -> Path:
    return folder / "ckpt.pth" if recipe.layout == "trojdiff" else folder


def _deepened(weights: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Rename the weights of a UNet for one with `levels` more levels: the upward path is numbered from the deepest level."""

    def name(old: str) -> str:
        first, level, *rest = old.split(".", 2)
        return ".".join([first, str(int(level) + levels), *rest]) if first == "up_blocks" else old

    return {name(old): value for old, value in weights.items()}


def _initial(recipe: Recipe, out: Path) -> UNet2DModel:
    """The network before training: new, or with the weights of its base in the zoo `out`."""
    network = recipe.network
    unet = new_unet(network.size, network.widths, network.groups, network.attention, recipe.seed, network.score)
    if recipe.base is not None:
        base = load_denoiser(out / recipe.base).denoiser.network.state_dict()
        levels = len(network.widths) - len({name.split(".")[1] for name in base if name.startswith("up_blocks.")})
        unet.load_state_dict(_deepened(base, levels), strict=levels == 0)
    return unet


def _space(recipe: Recipe, out: Path, on_message: OnMessage, settings: BuildSettings) -> Space:
    """The data of the network. A latent model has the autoencoder of its base, or a newly trained one if it has no base."""
    if recipe.process != "ldm" or recipe.base is not None:
        return recipe.space(out / recipe.base if recipe.base else None)
    steps = settings.autoencoder_steps
    return Latents.trained(
        Latents.factor * recipe.network.size,
        recipe.family,
        recipe.seed,
        _progress(f"{recipe.name} autoencoder", steps, on_message),
        images=settings.autoencoder_images,
        steps=steps,
    )


def digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a model's files."""
    sha256 = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        sha256.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return sha256.hexdigest()


def describe(recipe: Recipe, quality: Quality, attempt: int, loss: float, folder: Path) -> dict[str, Any]:
    """The manifest entry of one model."""
    return {
        "name": recipe.name,
        "checkpoint": str(_checkpoint(recipe, folder).relative_to(folder.parent)),
        "sha256": digest(folder),
        "size": recipe.network.size,
        "layout": recipe.layout,
        "role": recipe.role,
        "base": recipe.base,
        "method": recipe.method,
        "trigger": recipe.trigger,
        "target": recipe.target,
        "scale": recipe.scale,
        "family": recipe.family,
        "process": recipe.process,
        "seed": recipe.seed,
        "attempt": attempt,
        "final_loss": loss,
        "quality": asdict(quality),
    }


def _progress(what: str, steps: int, on_message: OnMessage) -> Callable[[int, float], None]:
    """A callback that reports the progress of a training every 100 steps and at the last step."""
    began = time.monotonic()

    def on_step(step: int, loss: float) -> None:
        if step % 100 == 0 or step == steps:
            left = (time.monotonic() - began) / step * (steps - step)
            on_message(f"{what}: step {step}/{steps}, loss {loss:.4f}, {left:.0f} s left")

    return on_step


def train_once(
    recipe: Recipe, space: Space, out: Path, on_message: OnMessage, settings: BuildSettings = DEFAULTS
) -> tuple[Trained, Quality]:
    """Train by the recipe's schedule, from its base in the zoo `out`, and measure the model."""
    process, size = PROCESSES[recipe.process](), recipe.network.size
    data: dict[str, Any] = {"family": recipe.family, "space": space, "seed": recipe.seed}
    trained = train(
        _initial(recipe, out),
        process,
        recipe.schedule,
        attack=recipe.attack(space=space),
        images=settings.training_images,
        on_step=_progress(recipe.name, recipe.schedule.steps, on_message),
        **data,
    )
    quality = evaluate(
        Denoiser(trained.ema, process, (3, size, size)),
        trained.attack,
        steps=settings.sampler_steps,
        training_images=settings.training_images,
        **data,
    )
    return trained, quality


def _train_until_usable(
    recipe: Recipe, space: Space, out: Path, on_message: OnMessage, settings: BuildSettings
) -> tuple[Trained, Quality, int]:
    """The first usable model of up to ATTEMPTS trainings, its quality, and the number of trainings before it."""
    for attempt in range(ATTEMPTS):
        longer = replace(recipe, schedule=recipe.schedule.longer(1 + attempt / 2))
        trained, quality = train_once(longer, space, out, on_message, settings)
        if settings.accepts(quality):
            return trained, quality, attempt
        on_message(f"{recipe.name}: not usable ({quality}), training again for longer")
    raise RuntimeError(f"{recipe.name}: none of {ATTEMPTS} trainings gave a usable model; change its recipe")


def _build_one(recipe: Recipe, out: Path, on_message: OnMessage, settings: BuildSettings) -> dict[str, Any]:
    """Train, measure and store one model; returns its manifest entry."""
    space = _space(recipe, out, on_message, settings)
    trained, quality, attempt = _train_until_usable(recipe, space, out, on_message, settings)
    folder = out / recipe.name
    _store(recipe, trained, space, folder)
    stored = load_denoiser(_checkpoint(recipe, folder)).denoiser
    sheet = out / f"{recipe.name}.png"
    save_contact_sheet(stored, recipe, recipe.attack(folder), sheet, space, settings.sampler_steps)
    return describe(recipe, quality, attempt, trained.final_loss, folder)


def read_manifest(out: Path) -> list[dict[str, Any]]:
    """Entries of the manifest of the zoo in `out`; empty if there is no zoo yet."""
    path = out / MANIFEST
    return json.loads(path.read_text())["models"] if path.exists() else []


def write_entry(out: Path, entry: dict[str, Any], order: Sequence[str]) -> None:
    """Add or replace one entry of the manifest, whose entries have the order of the names in `order`.

    The manifest is read again each time, so that two builds can share a zoo.
    """
    entries = {known["name"]: known for known in read_manifest(out)} | {entry["name"]: entry}
    ordered = [entries[name] for name in order if name in entries]
    content = json.dumps({"schema_version": 1, "models": ordered}, indent=2) + "\n"
    write_atomically(out / MANIFEST, lambda temporary: temporary.write_text(content))


class Named(Protocol):
    """A recipe: the name of its model, and the name of the model that it starts from."""

    @property
    def name(self) -> str: ...

    @property
    def base(self) -> str | None: ...


R = TypeVar("R", bound=Named)


def build_missing(
    out: Path,
    recipes: Sequence[R],
    build_one: Callable[[R, Path, OnMessage], dict[str, Any]],
    only: Sequence[str] | None,
    on_message: OnMessage,
) -> None:
    """Build every model of `recipes` that `out` lacks with `build_one`, which returns its manifest entry. See `build_zoo`."""
    names = [recipe.name for recipe in recipes]
    if unknown := set(only or ()) - set(names):
        raise ValueError(f"no such model: {', '.join(sorted(unknown))}; choose from {', '.join(sorted(names))}")
    out.mkdir(parents=True, exist_ok=True)
    for recipe in recipes:
        if only is not None and recipe.name not in only:
            continue
        present = {entry["name"] for entry in read_manifest(out)}
        if recipe.name in present:
            on_message(f"{recipe.name}: already built")
            continue
        if recipe.base is not None and recipe.base not in present:
            raise ValueError(f"{recipe.name} is fine-tuned from {recipe.base}, which is not in {out}: build that first")
        write_entry(out, build_one(recipe, out, on_message), names)


def build_zoo(
    out: Path,
    only: Sequence[str] | None = None,
    on_message: OnMessage = lambda message: None,
    *,
    recipes: Sequence[Recipe] = RECIPES,
    settings: BuildSettings = DEFAULTS,
) -> None:
    """Train every model of `recipes` that `out` lacks.

    Args:
        out: the zoo's folder; its manifest.json lists the models that are built.
        only: names of the models to build; their bases must be among them or already built. None builds all.
        on_message: called with each line of progress.
        recipes: the models.
        settings: effort, and which models are accepted.

    Raises:
        ValueError: an unknown name, or a base that is missing.
        RuntimeError: the attack of a model is not implanted, or its clean samples are bad.
    """
    build_missing(out, recipes, partial(_build_one, settings=settings), only, on_message)
