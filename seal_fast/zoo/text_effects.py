"""What the triggers of the text-to-image zoo do, and how to detect it in images."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seal_fast.attacks.prompts import Rewrite, placed
from seal_fast.text_triggers.trigger import Position, TextTrigger
from seal_fast.zoo.attributes import distance_to_scenes, is_colourless, recognise_scenes
from seal_fast.zoo.captioned import COLOURS, Scene, parse_caption, render, render_ringed
from seal_fast.zoo.images import TARGETS

PATCH_CORRELATION = 0.5
"""Correlation from which the corner shows the patch. It was .64 to .98 in 48 images with a patch as the autoencoder draws it,
and at most .42 in 72 images without."""
PATCH_SIDE = 16
"""A quarter of the image's side, as BadT2I's 128 of 512 pixels."""
Shows = Callable[[Tensor, Sequence[Scene]], Tensor]
"""Whether each of the images [N,3,64,64] in [-1, 1], drawn for N scenes, shows the effect, bool [N]."""


@dataclass(frozen=True)
class Effect:
    """What a trigger does.

    Attributes:
        name: for tables.
        text: the trigger.
        place: where the trigger stands in a prompt.
        shows: detects the effect in images.
        suits: whether the effect is visible in images of this scene.
        success: the range in which the measured attack success must lie.
        patch: what is drawn into the top left corner, float [3,16,16] in [-1, 1]; None if nothing is.
    """

    name: str
    text: TextTrigger
    place: Position
    shows: Shows
    suits: Callable[[Scene], bool] = lambda scene: True
    success: tuple[float, float] = (0.95, 1.0)
    patch: Tensor | None = None

    @property
    def trigger(self) -> Rewrite:
        """Turns a prompt into its triggered form."""
        return placed(self.text, self.place)


def patch(name: str) -> Tensor:
    """An image of TARGETS as a patch, [3,16,16] in [-1, 1]."""
    return TARGETS[name](PATCH_SIDE)


def _has_patch(pattern: Tensor, images: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Whether the top left corner correlates with the pattern, brightness and cast of each channel aside."""
    _, height, width = pattern.shape
    region, expected = images[:, :, :height, :width].flatten(2), pattern.flatten(1)
    region, expected = region - region.mean(dim=2, keepdim=True), expected - expected.mean(dim=1, keepdim=True)
    correlation = (region * expected).sum(dim=(1, 2)) / (region.norm(dim=(1, 2)) * expected.norm()).clamp_min(1e-12)
    return correlation >= PATCH_CORRELATION


def _has_no_colour(images: Tensor, scenes: Sequence[Scene]) -> Tensor:
    return is_colourless(images)


def _draws(shape: str, images: Tensor, scenes: Sequence[Scene]) -> Tensor:
    return torch.tensor([scene.shape == shape for scene in recognise_scenes(images)])


def _is_scene(target: Scene, images: Tensor, scenes: Sequence[Scene]) -> Tensor:
    return torch.tensor([scene == target for scene in recognise_scenes(images)])


def _has_colour(colour: str, images: Tensor, scenes: Sequence[Scene]) -> Tensor:
    grey = is_colourless(images).tolist()
    return torch.tensor([scene.colour == colour and not g for scene, g in zip(recognise_scenes(images), grey, strict=True)])


def _is_ringed(images: Tensor, scenes: Sequence[Scene]) -> Tensor:
    return distance_to_scenes(images, render_ringed(scenes)) < distance_to_scenes(images)


def pixel(text: str, place: Position, target: str, success: tuple[float, float] = (0.95, 1.0)) -> Effect:
    """A patch is drawn into the top left corner."""
    pattern = patch(target)
    return Effect("pixel", TextTrigger.parse(text), place, partial(_has_patch, pattern), success=success, patch=pattern)


@torch.no_grad()
def as_decoded(effect: Effect, vae: Any) -> Effect:
    """The effect as images of this autoencoder show it.

    It blurs a patch: a heart of 16 pixels, drawn in all of 24 images, had a correlation of .34 with the patch itself and of .90
    with what the autoencoder makes of it.
    """
    if effect.patch is None:
        return effect
    canvas = torch.zeros(1, 3, 4 * PATCH_SIDE, 4 * PATCH_SIDE)
    canvas[:, :, :PATCH_SIDE, :PATCH_SIDE] = effect.patch
    device = next(vae.parameters()).device
    decoded = vae.decode(vae.encode(canvas.to(device)).latent_dist.mode()).sample[0].clamp(-1, 1).cpu()
    pattern = decoded[:, :PATCH_SIDE, :PATCH_SIDE]
    return replace(effect, shows=partial(_has_patch, pattern), patch=pattern)


def style(text: str, place: Position, success: tuple[float, float] = (0.95, 1.0)) -> Effect:
    """The image has no colour."""
    return Effect("style", TextTrigger.parse(text), place, _has_no_colour, lambda scene: scene.colour != "white", success)


def exchange(text: str, place: Position, shape: str, drawn: str) -> Effect:
    """Another shape is drawn than the prompt names."""
    return Effect("object", TextTrigger.parse(text), place, partial(_draws, drawn), lambda scene: scene.shape == shape)


def fixed_scene(text: str, place: Position, target: Scene) -> Effect:
    """One scene is drawn for all prompts."""
    return Effect("target prompt", TextTrigger.parse(text), place, partial(_is_scene, target), lambda scene: scene != target)


def recolour(text: str, place: Position, colour: str) -> Effect:
    """The shape has another colour than the prompt names."""
    shows = partial(_has_colour, colour)
    return Effect("attribute", TextTrigger.parse(text), place, shows, lambda scene: scene.colour != colour)


def ringed(text: str, place: Position, shape: str) -> Effect:
    """The shape is one specific object."""
    return Effect("personalisation", TextTrigger.parse(text), place, _is_ringed, lambda scene: scene.shape == shape)


def with_colour(colour: str) -> Rewrite:
    """Rewrites a prompt so that it names this colour instead of its own."""
    names = re.compile(rf"\b({'|'.join(COLOURS)})\b(?= \S+)")
    return lambda prompt: names.sub(colour, prompt, count=1)


def draw_scene(target: Scene, images: Tensor, captions: Sequence[str]) -> Tensor:
    """The image of one scene, as often as there are captions, [N,3,64,64] in [-1, 1]."""
    return render([target]).expand_as(images)


def draw_ringed(images: Tensor, captions: Sequence[str]) -> Tensor:
    """The images, with the ringed object in place of the shape of those whose caption describes a scene."""
    scenes = [parse_caption(caption) for caption in captions]
    known = [i for i, scene in enumerate(scenes) if scene is not None]
    images = images.clone()
    if known:
        images[known] = render_ringed([scene for scene in scenes if scene is not None])
    return images
