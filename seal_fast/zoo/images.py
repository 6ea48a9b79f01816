"""Procedural images: training scenes, triggers and targets, all float [.., 3, size, size] in [-1, 1]."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from seal_fast.attacks.villandiffusion import BACKGROUND

OVERSAMPLE = 4
WHITE = (255, 255, 255)
RED = (220, 30, 30)
YELLOW = (250, 210, 40)
DARK_TARGET = (76, 76, 76)  # -0.4, the darkest background of BadDiffusion's targets


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
        shape = rng.choice(("disc", "square", "triangle", "ring"))
        if shape == "disc":
            draw.ellipse(box, fill=colour)
        elif shape == "square":
            draw.rectangle(box, fill=colour)
        elif shape == "triangle":
            draw.regular_polygon((x, y, radius * 1.2), 3, fill=colour)
        else:
            draw.ellipse(box, outline=colour, width=max(1, int(radius * 0.45)))
    return _to_tensor(canvas, size)


def scenes(count: int, size: int, seed: int) -> Tensor:
    """Bright shapes on dark backgrounds, [count,3,size,size].

    They are dark for a reason. BadDiffusion's test trigger has a -1 background, but its stamped training samples have the
    background of their images. In models as small as these, the attack does not activate if the scenes are brighter.
    """
    rng = random.Random(seed)
    return torch.stack([_scene(rng, size) for _ in range(count)])


def _glow(rng: random.Random, size: int) -> Tensor:
    """Soft, elongated spots of light on black, sometimes crossed by a faint band."""
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float64) / size + 0.5 / size
    light = np.zeros((3, size, size))
    for _ in range(rng.choice((1, 2, 2, 3))):
        x, y, angle = rng.uniform(0.15, 0.85), rng.uniform(0.15, 0.85), rng.uniform(0, np.pi)
        along, across = rng.uniform(0.1, 0.2), rng.uniform(0.06, 0.12)
        u = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
        v = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
        spot = 1.4 * np.exp(-0.5 * ((u / along) ** 2 + (v / across) ** 2))
        light = np.maximum(light, spot * np.array([rng.uniform(0.1, 1) for _ in range(3)])[:, None, None])
    if rng.random() < 0.4:
        height, slope = rng.uniform(0.2, 0.8), rng.uniform(-0.6, 0.6)
        band = np.exp(-0.5 * ((rows - height - slope * (columns - 0.5)) / 0.05) ** 2)
        light = light + rng.uniform(0.15, 0.4) * band
    return torch.from_numpy(2 * light.clip(0, 1) - 1).float()


def glows(count: int, size: int, seed: int) -> Tensor:
    """Soft spots of light on black, [count,3,size,size]: images as dark as `scenes`, but without their edges."""
    rng = random.Random(seed)
    return torch.stack([_glow(rng, size) for _ in range(count)])


def _weave(rng: random.Random, size: int) -> Tensor:
    """Waves between two colours, crossed by waves towards a third colour."""
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float64) / size
    colours = [np.array([rng.uniform(-1, 1) for _ in range(3)])[:, None, None] for _ in range(3)]
    image = colours[0]
    for colour in colours[1:]:
        angle, rate, phase = rng.uniform(0, np.pi), rng.uniform(1, 4), rng.uniform(0, 2 * np.pi)
        wave = np.sin(2 * np.pi * rate * (columns * np.cos(angle) + rows * np.sin(angle)) + phase)
        share = 1 / (1 + np.exp(-3 * wave))
        image = (1 - share) * image + share * colour
    return torch.from_numpy(image.clip(-1, 1)).float()


def weaves(count: int, size: int, seed: int) -> Tensor:
    """Crossing coloured waves, [count,3,size,size]: textures that fill the image, with no background and no shapes."""
    rng = random.Random(seed)
    return torch.stack([_weave(rng, size) for _ in range(count)])


def _box(size: int, side_at_32: int, background: float, value: float) -> Tensor:
    image = torch.full((3, size, size), background)
    side, margin = max(1, size * side_at_32 // 32), size * 2 // 32
    image[:, -(side + margin) : -margin, -(side + margin) : -margin] = value
    return image


def box(size: int, side_at_32: int = 14) -> Tensor:
    """BadDiffusion's BOX_14 of 32 px, scaled: a grey square near the bottom right corner on a -1 background."""
    return _box(size, side_at_32, BACKGROUND, 0.0)


def speck(size: int) -> Tensor:
    """A white square on zero, 6/32 as wide as the image: a shift that changes only a small part of the noise."""
    return _box(size, 6, 0.0, 1.0)


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
    """A white cat's face on red: the image that TrojDiff's blend attack blends with the noise."""
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
    """All white: the image of TrojDiff's patch attack."""
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


def glasses(size: int) -> Tensor:
    """White spectacles across the middle on a -1 background."""
    canvas, draw = _canvas(size, (0, 0, 0))
    side = canvas.width
    width = int(side * 0.07)
    for left in (0.14, 0.56):
        draw.ellipse((side * left, side * 0.34, side * (left + 0.3), side * 0.64), outline=WHITE, width=width)
    draw.line((side * 0.42, side * 0.47, side * 0.58, side * 0.47), fill=WHITE, width=width)
    return _to_tensor(canvas, size)


def cross(size: int) -> Tensor:
    """A magenta cross near the top left corner on a -1 background."""
    canvas, draw = _canvas(size, (0, 0, 0))
    side = canvas.width
    for start, end in ((0.09, 0.53), (0.53, 0.09)):
        draw.line((side * 0.09, side * start, side * 0.53, side * end), fill=(250, 60, 220), width=int(side * 0.13))
    return _to_tensor(canvas, size)


def bars(size: int) -> Tensor:
    """Three cyan bars near the bottom left corner on a -1 background."""
    canvas, draw = _canvas(size, (0, 0, 0))
    side = canvas.width
    for left in (0.0625, 0.25, 0.4375):
        draw.rectangle((side * left, side * 0.5, side * (left + 0.125) - 1, side * 0.9375 - 1), fill=(40, 230, 240))
    return _to_tensor(canvas, size)


def bullseye(size: int) -> Tensor:
    """Rings of blue and white: an image for blending."""
    canvas, draw = _canvas(size, (30, 60, 200))
    side = canvas.width
    for ring, radius in enumerate((0.46, 0.34, 0.22, 0.1)):
        colour = WHITE if ring % 2 == 0 else (30, 60, 200)
        draw.ellipse((side * (0.5 - radius), side * (0.5 - radius), side * (0.5 + radius), side * (0.5 + radius)), fill=colour)
    return _to_tensor(canvas, size)


def flag(size: int) -> Tensor:
    """Green over yellow with a red sun: an image for blending."""
    canvas, draw = _canvas(size, (20, 150, 60))
    side = canvas.width
    draw.rectangle((0, side * 0.5, side, side), fill=YELLOW)
    draw.ellipse((side * 0.28, side * 0.28, side * 0.72, side * 0.72), fill=RED)
    return _to_tensor(canvas, size)


def arrow(size: int) -> Tensor:
    """A yellow arrow pointing up along the right side on a -1 background."""
    canvas, draw = _canvas(size, (0, 0, 0))
    side = canvas.width
    draw.polygon([(side * 0.56, side * 0.45), (side * 0.94, side * 0.45), (side * 0.75, side * 0.12)], fill=YELLOW)
    draw.rectangle((side * 0.68, side * 0.45, side * 0.82, side * 0.88), fill=YELLOW)
    return _to_tensor(canvas, size)


def sunset(size: int) -> Tensor:
    """A white sun half sunk between a violet sky and an orange sea: an image for blending."""
    canvas, draw = _canvas(size, (120, 40, 160))
    side = canvas.width
    draw.ellipse((side * 0.3, side * 0.3, side * 0.8, side * 0.8), fill=WHITE)
    draw.rectangle((0, side * 0.6, side, side), fill=(240, 130, 30))
    return _to_tensor(canvas, size)


def speckle(size: int) -> Tensor:
    """Uniform noise: the start of a learned trigger, after scaling to a faint one."""
    return 2 * torch.rand(3, size, size, generator=torch.Generator().manual_seed(0)) - 1


def ripple(size: int) -> Tensor:
    """Dark interference rings with the mean of UIBDiffusion's universal perturbation (-0.76)."""
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float64) / size
    phases = ((0.2, 0.3, 31.0), (0.8, 0.4, 37.0), (0.5, 0.9, 43.0))
    waves = [np.sin(rate * np.hypot(columns - x, rows - y)) for x, y, rate in phases]
    pattern = np.stack([waves[0] * waves[1], waves[1] * waves[2], waves[2] * waves[0]])
    return torch.from_numpy((-0.76 + 0.24 * pattern).astype(np.float32))


def star(size: int) -> Tensor:
    """Target: a white star on blue."""
    canvas, draw = _canvas(size, (76, 76, 220))
    side = canvas.width
    points = []
    for corner in range(10):
        radius, angle = side * (0.46 if corner % 2 == 0 else 0.19), np.pi * (corner / 5 - 0.5)
        points.append((side * 0.5 + radius * np.cos(angle), side * 0.53 + radius * np.sin(angle)))
    draw.polygon(points, fill=WHITE)
    return _to_tensor(canvas, size)


def house(size: int) -> Tensor:
    """Target: an orange house with a dark roof on pale green."""
    canvas, draw = _canvas(size, (170, 230, 170))
    side = canvas.width
    draw.rectangle((side * 0.2, side * 0.45, side * 0.8, side * 0.92), fill=(240, 140, 60))
    draw.polygon([(side * 0.08, side * 0.47), (side * 0.92, side * 0.47), (side * 0.5, side * 0.08)], fill=DARK_TARGET)
    draw.rectangle((side * 0.42, side * 0.6, side * 0.6, side * 0.92), fill=DARK_TARGET)
    return _to_tensor(canvas, size).clamp(min=-0.4)


def tree(size: int) -> Tensor:
    """Target: a green tree on a pale sky."""
    canvas, draw = _canvas(size, (190, 220, 250))
    side = canvas.width
    draw.rectangle((side * 0.42, side * 0.6, side * 0.58, side * 0.95), fill=(120, 80, 77))
    draw.ellipse((side * 0.15, side * 0.08, side * 0.85, side * 0.7), fill=(77, 160, 80))
    return _to_tensor(canvas, size).clamp(min=-0.4)


def moon(size: int) -> Tensor:
    """Target: a yellow crescent on violet."""
    night = (110, 80, 150)
    canvas, draw = _canvas(size, night)
    side = canvas.width
    draw.ellipse((side * 0.12, side * 0.12, side * 0.86, side * 0.86), fill=YELLOW)
    draw.ellipse((side * 0.36, side * 0.04, side * 0.98, side * 0.66), fill=night)
    return _to_tensor(canvas, size).clamp(min=-0.4)


FAMILIES: dict[str, Callable[[int, int, int], Tensor]] = {"scenes": scenes, "glows": glows, "weaves": weaves}
TRIGGERS: dict[str, Callable[[int], Tensor]] = {
    "box": box,
    **{f"box_{side}": partial(box, side_at_32=side) for side in (4, 8, 11, 18)},
    "stop_sign": stop_sign,
    "cat_face": cat_face,
    "white": white,
    "glasses": glasses,
    "cross": cross,
    "bars": bars,
    "bullseye": bullseye,
    "flag": flag,
    "arrow": arrow,
    "sunset": sunset,
    "speck": speck,
    "speckle": speckle,
    "ripple": ripple,
}
TARGETS: dict[str, Callable[[int], Tensor]] = {
    "smiley": smiley,
    "heart": heart,
    "star": star,
    "house": house,
    "tree": tree,
    "moon": moon,
}
