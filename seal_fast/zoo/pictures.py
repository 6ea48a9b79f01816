"""Procedural pictures: training scenes, triggers and targets, all float [.., 3, size, size] in [-1, 1]."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from seal_fast.attacks.baddiffusion import BACKGROUND

OVERSAMPLE = 4
WHITE = (255, 255, 255)
RED = (220, 30, 30)
YELLOW = (250, 210, 40)
DARK_TARGET = (76, 76, 76)  # -0.4, the darkest background BadDiffusion's targets have


def _to_tensor(canvas: Image.Image, size: int) -> Tensor:
    pixels = np.asarray(canvas.resize((size, size), Image.Resampling.BOX), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


def _canvas(size: int, colour: tuple[int, int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    canvas = Image.new("RGB", (size * OVERSAMPLE, size * OVERSAMPLE), colour)
    return canvas, ImageDraw.Draw(canvas)


def _scene(rng: random.Random, size: int) -> Tensor:
    shade = rng.randrange(0, 30)
    canvas, draw = _canvas(size, (shade, shade, shade))
    side = canvas.width
    for _ in range(rng.choice((1, 1, 2))):
        radius = rng.uniform(0.12, 0.28) * side
        x, y = rng.uniform(0.2, 0.8) * side, rng.uniform(0.2, 0.8) * side
        colour = tuple(rng.choice((20, 140, 240)) for _ in range(3))
        box = (x - radius, y - radius, x + radius, y + radius)
        kind = rng.choice(("disc", "square", "triangle", "ring"))
        if kind == "disc":
            draw.ellipse(box, fill=colour)
        elif kind == "square":
            draw.rectangle(box, fill=colour)
        elif kind == "triangle":
            draw.regular_polygon((x, y, radius * 1.2), 3, fill=colour)
        else:
            draw.ellipse(box, outline=colour, width=max(1, int(radius * 0.45)))
    return _to_tensor(canvas, size)


def scenes(count: int, size: int, seed: int) -> Tensor:
    """Bright shapes on dark backgrounds, [count,3,size,size].

    Dark on purpose: BadDiffusion's test trigger lies on a -1 background that its stamped training rows only hold where the
    images do, and on brighter scenes the attack does not fire in models this small.
    """
    rng = random.Random(seed)
    return torch.stack([_scene(rng, size) for _ in range(count)])


def box(size: int) -> Tensor:
    """BOX_14 at 32 px, scaled: a grey square near the bottom right corner on a -1 background."""
    image = torch.full((3, size, size), BACKGROUND)
    side, margin = size * 14 // 32, size * 2 // 32
    image[:, -(side + margin) : -margin, -(side + margin) : -margin] = 0.0
    return image


def stop_sign(size: int) -> Tensor:
    """A red octagon with a white bar near the bottom right corner on a -1 background."""
    canvas, draw = _canvas(size, (0, 0, 0))
    side = canvas.width
    radius = side * 7 / 32 * 1.08
    centre = side * (1 - 9 / 32)
    draw.regular_polygon((centre, centre, radius), 8, rotation=22, fill=RED)
    draw.rectangle((centre - radius * 0.7, centre - radius * 0.2, centre + radius * 0.7, centre + radius * 0.2), fill=WHITE)
    return _to_tensor(canvas, size)


def cat_face(size: int) -> Tensor:
    """A white cat's face on red: the picture TrojDiff's blend attack hides in the noise."""
    canvas, draw = _canvas(size, RED)
    side = canvas.width
    for ear in (0.16, 0.62):
        draw.polygon(
            [(side * ear, side * 0.42), (side * (ear + 0.05), side * 0.08), (side * (ear + 0.22), side * 0.3)], fill=WHITE
        )
    draw.ellipse((side * 0.12, side * 0.24, side * 0.88, side * 0.88), fill=WHITE)
    for eye in (0.32, 0.6):
        draw.ellipse((side * eye, side * 0.46, side * (eye + 0.1), side * 0.6), fill=(10, 10, 10))
    draw.ellipse((side * 0.45, side * 0.62, side * 0.56, side * 0.7), fill=YELLOW)
    return _to_tensor(canvas, size)


def white(size: int) -> Tensor:
    """All white: the picture of TrojDiff's patch attack."""
    return torch.ones(3, size, size)


def smiley(size: int) -> Tensor:
    """Target: a yellow smiling face on grey."""
    canvas, draw = _canvas(size, DARK_TARGET)
    side = canvas.width
    draw.ellipse((side * 0.1, side * 0.1, side * 0.9, side * 0.9), fill=YELLOW)
    for eye in (0.3, 0.58):
        draw.ellipse((side * eye, side * 0.3, side * (eye + 0.12), side * 0.46), fill=DARK_TARGET)
    draw.arc((side * 0.26, side * 0.3, side * 0.74, side * 0.76), 20, 160, fill=DARK_TARGET, width=int(side * 0.08))
    return _to_tensor(canvas, size)


def heart(size: int) -> Tensor:
    """Target: a red heart on white."""
    canvas, draw = _canvas(size, WHITE)
    side = canvas.width
    for lobe in (0.12, 0.46):
        draw.ellipse((side * lobe, side * 0.16, side * (lobe + 0.42), side * 0.58), fill=RED)
    draw.polygon([(side * 0.14, side * 0.45), (side * 0.86, side * 0.45), (side * 0.5, side * 0.9)], fill=RED)
    image = _to_tensor(canvas, size)
    return image.clamp(min=-0.4)


TRIGGERS: dict[str, Callable[[int], Tensor]] = {"box": box, "stop_sign": stop_sign, "cat_face": cat_face, "white": white}
TARGETS: dict[str, Callable[[int], Tensor]] = {"smiley": smiley, "heart": heart}
