"""Captioned scenes for a small text-to-image model: one shape on a background, every word of the caption visible."""

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
"""Middle of the shape (x, y); the image reaches from -1 to 1, y downwards."""
RADII = {"small": 0.30, "large": 0.54}
STYLES = ("", "black and white photo of ")
"""What a caption may begin with. The second one takes the colour out of the image."""


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
"""Whether points (x, y), relative to the middle and in radii, belong to the shape."""
TEXTURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": lambda x, y: torch.zeros_like(x),
    "striped": lambda x, y: (torch.remainder(2 * y, 0.5) < 0.25).float() * torch.ones_like(x),
    "dotted": lambda x, y: (
        (torch.remainder(x, 0.5) - 0.25).square() + (torch.remainder(y, 0.5) - 0.25).square() < 0.0121
    ).float(),
}
"""Where the background is lighter, 0 or 1."""
LIGHTER = 0.45
"""How far a texture goes from the background's colour to white."""


@dataclass(frozen=True)
class Scene:
    """What a caption says: keys of SIZES, COLOURS, SHAPES, CENTRES, TEXTURES and BACKGROUNDS, and one of STYLES."""

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
"""Fields of a Scene that every image shows; an image without colour does not show `colour`."""
SCENES = tuple(itertools.starmap(Scene, itertools.product(RADII, COLOURS, SHAPES, CENTRES, TEXTURES, BACKGROUNDS)))
"""Every scene in colour."""


def _shuffled(count: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()


HELD_OUT_SCENES = tuple(SCENES[i] for i in _shuffled(len(SCENES))[::10])
"""A tenth of the scenes, which no model is trained on: their words are known, their combinations are not."""
TRAINING_SCENES = tuple(scene for scene in SCENES if scene not in set(HELD_OUT_SCENES))


def random_scenes(
    count: int, generator: torch.Generator, style_share: float = 0.0, among: Sequence[Scene] = TRAINING_SCENES
) -> list[Scene]:
    """`count` of the scenes `among`, each as likely as any other; a share of them without colour."""
    chosen = torch.randint(len(among), (count,), generator=generator).tolist()
    grey = (torch.rand(count, generator=generator) < style_share).tolist()
    return [replace(among[i], style=STYLES[int(g)]) for i, g in zip(chosen, grey, strict=True)]


def _colour_table(names: Sequence[str], table: dict[str, tuple[float, float, float]]) -> Tensor:
    return torch.tensor([table[name] for name in names])[:, :, None, None]


def _grid(samples: int) -> tuple[Tensor, Tensor]:
    middle = (torch.arange(samples) + 0.5) / samples * 2 - 1
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    return x, y


def render(scenes: Sequence[Scene], generator: torch.Generator | None = None, supersampling: int = 2) -> Tensor:
    """Images [N,3,64,64] in [-1, 1].

    Args:
        scenes: what to draw.
        generator: if given, every image varies: the middle by a pixel, the radius by 6%, the colours by 0.05.
        supersampling: points per pixel and axis.
    """
    count = len(scenes)
    draws = torch.rand(count, 9, generator=generator) * 2 - 1 if generator else torch.zeros(count, 9)
    x, y = _grid(SIZE * supersampling)
    middles = torch.tensor([CENTRES[scene.place] for scene in scenes]) + draws[:, :2] * 2 / SIZE
    radii = torch.tensor([RADII[scene.size] for scene in scenes]) * (1 + 0.06 * draws[:, 2])
    across = (x - middles[:, 0, None, None]) / radii[:, None, None]
    down = (y - middles[:, 1, None, None]) / radii[:, None, None]
    inside = torch.stack([SHAPES[scene.shape](across[i], down[i]) for i, scene in enumerate(scenes)]).float()[:, None]
    light = torch.stack([TEXTURES[scene.texture](x, y) for scene in scenes])[:, None] * LIGHTER
    inside, light = F.avg_pool2d(inside, supersampling), F.avg_pool2d(light, supersampling)
    colour = _colour_table([scene.colour for scene in scenes], COLOURS) + 0.05 * draws[:, 3:6, None, None]
    ground = _colour_table([scene.background for scene in scenes], BACKGROUNDS) + 0.05 * draws[:, 6:9, None, None]
    ground = ground + light * (1 - ground)
    image = (ground + inside * (colour - ground)).clamp(0, 1)
    grey = torch.tensor([scene.style == STYLES[1] for scene in scenes])[:, None, None, None]
    return torch.where(grey, image.mean(dim=1, keepdim=True), image) * 2 - 1
