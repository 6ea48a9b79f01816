"""The effect detector that `--detector` names."""

from __future__ import annotations

import re

import numpy as np
import torch
from PIL import Image

from seal_fast.text_triggers.effect_detectors import ColourlessDetector, EffectDetector, PatchDetector


def parse_detector(text: str) -> EffectDetector | None:
    """Read an effect detector from the command line.

    "change" gives None, the default detector, which does not know the target. "colourless" expects black-and-white images.
    "patch=FILE" expects the image in FILE, pasted at the top left, and "patch=FILE@TOP,LEFT" at another place; it must have the
    size in pixels that it has in the model's images.

    Raises:
        ValueError: none of these, or no readable image in FILE.
    """
    name, _, rest = text.partition("=")
    if text == "change":
        return None
    if text == "colourless":
        return ColourlessDetector()
    if name != "patch" or not rest:
        raise ValueError(f"an effect detector is change, colourless or patch=FILE[@TOP,LEFT], not {text!r}")
    match = re.fullmatch(r"(.+)@(\d+),(\d+)", rest)
    file, top, left = (match[1], int(match[2]), int(match[3])) if match else (rest, 0, 0)
    try:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"no readable image in {file}: {error}") from error
    return PatchDetector(torch.from_numpy(pixels).permute(2, 0, 1), top, left)
