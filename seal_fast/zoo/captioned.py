"""Captioned scenes for a small text-to-image model: one shape on a background, with every word of the caption visible."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 64
"""Side of the images, in pixels."""
COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.75, 0.20),
    "blue": (0.15, 0.30, 0.95),
    "yellow": (0.97, 0.88, 0.10),
    "pink": (0.98, 0.45, 0.75),
    "white": (1.00, 1.00, 1.00),
}
BACKGROUNDS = {
    "black": (0.05, 0.05, 0.05),
    "gray": (0.50, 0.50, 0.50),
    "brown": (0.45, 0.27, 0.10),
    "teal": (0.05, 0.45, 0.45),
}
CENTRES = {"left": (-0.44, 0.0), "right": (0.44, 0.0), "top": (0.0, -0.44), "bottom": (0.0, 0.44), "center": (0.0, 0.0)}
"""Centre (x, y) of the shape; the image extends from -1 to 1, with y downwards."""
RADII = {"small": 0.30, "large": 0.54}
STYLES = ("", "black and white photo of ")
"""Beginnings of a caption. The second one removes the colour from the image."""


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return x.square() + y.square() < 1


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) < 0.88


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return (y < 0.8) & (y > 2 * x.abs() - 1)


def _star(x: Tensor, y: Tensor) -> Tensor:
    # its edges run straight from a tip at radius 1 to a notch at radius 0.42, a tenth of the circle on
    notch, tenth = 0.42, math.pi / 5
    angle = (torch.remainder(torch.atan2(x, -y) + tenth, 2 * tenth) - tenth).abs()
    edge = notch * math.sin(tenth) / (angle.sin() + notch * (tenth - angle).sin())
    return x.square() + y.square() < edge.square()


def _cross(x: Tensor, y: Tensor) -> Tensor:
    thin, long = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs())
    return (thin < 0.32) & (long < 0.95)


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
}
"""Whether points (x, y), relative to the centre and in units of the radius, belong to the shape."""
TEXTURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": lambda x, y: torch.zeros_like(x),
    "striped": lambda x, y: (torch.remainder(2 * y, 0.5) < 0.25).float() * torch.ones_like(x),
    "dotted": lambda x, y: (
        (torch.remainder(x, 0.5) - 0.25).square() + (torch.remainder(y, 0.5) - 0.25).square() < 0.0121
    ).float(),
}
"""The lighter parts of the background: 1 there, 0 elsewhere."""
LIGHTER = 0.45
"""Colour of the lighter parts, from 0 (background) to 1 (white)."""


@dataclass(frozen=True)
class Scene:
    """The content of a caption: keys of RADII, COLOURS, SHAPES, CENTRES, TEXTURES and BACKGROUNDS, and one of STYLES."""

    size: str
    colour: str
    shape: str
    place: str
    texture: str
    background: str
    style: str = STYLES[0]

    @property
    def caption(self) -> str:
        return (
            f"{self.style}a {self.size} {self.colour} {self.shape} at the {self.place} "
            f"on a {self.texture} {self.background} background"
        )


ATTRIBUTES = ("size", "colour", "shape", "place", "texture", "background")
"""Fields of a Scene that its image shows; an image without colour does not show `colour`."""
SCENES = tuple(itertools.starmap(Scene, itertools.product(RADII, COLOURS, SHAPES, CENTRES, TEXTURES, BACKGROUNDS)))
"""All scenes in colour."""


def _shuffled(count: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()


HELD_OUT_SCENES = tuple(SCENES[i] for i in _shuffled(len(SCENES))[::10])
"""A tenth of the scenes, on which no model is trained: the models know their words, but not their combinations."""
TRAINING_SCENES = tuple(scene for scene in SCENES if scene not in set(HELD_OUT_SCENES))


def random_scenes(
    count: int, generator: torch.Generator, style_share: float = 0.0, among: Sequence[Scene] = TRAINING_SCENES
) -> list[Scene]:
    """Draw `count` of the scenes `among`, all equally likely; a share `style_share` of them is without colour."""
    chosen = torch.randint(len(among), (count,), generator=generator).tolist()
    grey = (torch.rand(count, generator=generator) < style_share).tolist()
    return [replace(among[i], style=STYLES[int(g)]) for i, g in zip(chosen, grey, strict=True)]


def _colour_table(names: Sequence[str], table: dict[str, tuple[float, float, float]]) -> Tensor:
    return torch.tensor([table[name] for name in names])[:, :, None, None]


def _grid(samples: int) -> tuple[Tensor, Tensor]:
    """Coordinates x and y, in -1 .. 1, of samples x samples points."""
    coordinates = (torch.arange(samples) + 0.5) / samples * 2 - 1
    y, x = torch.meshgrid(coordinates, coordinates, indexing="ij")
    return x, y


def render(scenes: Sequence[Scene], generator: torch.Generator | None = None, supersampling: int = 2) -> Tensor:
    """Draw images [N,3,64,64] in [-1, 1] of N scenes.

    Args:
        scenes: the scenes.
        generator: if given, each image varies randomly: the centre by a pixel, the radius by 6%, the colours by 0.05.
        supersampling: points per pixel and axis.
    """
    count = len(scenes)
    jitter = torch.rand(count, 9, generator=generator) * 2 - 1 if generator else torch.zeros(count, 9)
    x, y = _grid(SIZE * supersampling)
    centres = torch.tensor([CENTRES[scene.place] for scene in scenes]) + jitter[:, :2] * 2 / SIZE
    radii = torch.tensor([RADII[scene.size] for scene in scenes]) * (1 + 0.06 * jitter[:, 2])
    across = (x - centres[:, 0, None, None]) / radii[:, None, None]
    down = (y - centres[:, 1, None, None]) / radii[:, None, None]
    inside = torch.stack([SHAPES[scene.shape](across[i], down[i]) for i, scene in enumerate(scenes)]).float()[:, None]
    light = torch.stack([TEXTURES[scene.texture](x, y) for scene in scenes])[:, None] * LIGHTER
    inside, light = F.avg_pool2d(inside, supersampling), F.avg_pool2d(light, supersampling)
    colour = _colour_table([scene.colour for scene in scenes], COLOURS) + 0.05 * jitter[:, 3:6, None, None]
    ground = _colour_table([scene.background for scene in scenes], BACKGROUNDS) + 0.05 * jitter[:, 6:9, None, None]
    ground = ground + light * (1 - ground)
    image = (ground + inside * (colour - ground)).clamp(0, 1)
    grey = torch.tensor([scene.style == STYLES[1] for scene in scenes])[:, None, None, None]
    return torch.where(grey, image.mean(dim=1, keepdim=True), image) * 2 - 1


RINGS = ("yellow", "blue")
"""Colours of the ringed object, from the COLOURS of a shape and of the rings inside it."""


def render_ringed(scenes: Sequence[Scene]) -> Tensor:
    """Draw images [N,3,64,64] in [-1, 1] of N scenes whose shape is one specific object: yellow, with blue rings."""
    images = render([replace(scene, colour=RINGS[0]) for scene in scenes]) / 2 + 0.5
    rings = torch.tensor(COLOURS[RINGS[1]])[:, None, None]
    x, y = _grid(SIZE)
    for image, scene in zip(images, scenes, strict=True):
        (left, top), radius = CENTRES[scene.place], RADII[scene.size]
        across, down = (x - left) / radius, (y - top) / radius
        ring = torch.remainder(torch.hypot(across, down), 0.5) > 0.25
        image.copy_(torch.where(ring & SHAPES[scene.shape](across, down), rings, image))
    return images * 2 - 1


def parse_caption(caption: str) -> Scene | None:
    """The scene of a caption, which may hold other words; None if it names no scene in colour."""
    tables: tuple[dict[str, object], ...] = (RADII, COLOURS, SHAPES, CENTRES, TEXTURES, BACKGROUNDS)  # type: ignore[assignment]
    words = caption.split()
    found = [[word for word in words if word in table] for table in tables]
    if STYLES[1] in caption or any(len(names) != 1 for names in found):
        return None
    return Scene(*(names[0] for names in found))
