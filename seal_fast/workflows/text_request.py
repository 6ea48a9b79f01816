"""What a person asks of an unlearning in words: effect detectors and prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from seal_fast.checkpoints import CheckpointError
from seal_fast.checkpoints.card import captions
from seal_fast.text_triggers.effect_detectors import ColourlessDetector, EffectDetector, PatchDetector

MAX_PROMPT_BYTES = 1 << 24
FEWEST_CAPTIONS = 40
"""Of a model card that make prompts: half are measured on, and 20 without an effect bound its rate to 0.16."""


def parse_detector(text: str) -> EffectDetector | None:
    """An effect detector from the command line: "change" (which gives None), "colourless", or "patch=FILE".

    "patch=FILE" detects an image that is pasted at the top left, "patch=FILE@TOP,LEFT" at another place. The image in FILE
    has the size in pixels that it has in the model's images.

    Raises:
        ValueError: none of these, or no image.
    """
    kind, _, rest = text.partition("=")
    if text == "change":
        return None
    if text == "colourless":
        return ColourlessDetector()
    if kind != "patch" or not rest:
        raise ValueError(f"an effect detector is change, colourless or patch=FILE[@TOP,LEFT], not {text!r}")
    match = re.fullmatch(r"(.+)@(\d+),(\d+)", rest)
    file, top, left = (match[1], int(match[2]), int(match[3])) if match else (rest, 0, 0)
    try:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"no image in {file}: {error}") from error
    return PatchDetector(torch.from_numpy(pixels).permute(2, 0, 1), top, left)


def read_prompts(file: Path) -> list[str]:
    """The different prompts of a UTF-8 text file, one a line.

    Raises:
        CheckpointError: not such a file, or fewer than four prompts: two to train on and two to measure on.
    """
    try:
        with file.open("rb") as stream:
            lines = stream.read(MAX_PROMPT_BYTES).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(file, f"no readable UTF-8 text: {error}") from error
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(prompts) < 4:
        raise CheckpointError(file, "fewer than four different prompts, one a line: two to train on and two to measure on")
    return prompts


def choose_prompts(prompts: Sequence[str] | None, folder: Path | None) -> tuple[list[str], list[str], str]:
    """Prompts to train on, held-out ones, and where they come from: "given", "model card" or "shipped".

    Of those given, and of the card's in `folder` if it has FEWEST_CAPTIONS, every other one is held out.
    """
    source = "given"
    if prompts is None and folder is not None:
        prompts, source = captions(folder), "model card"
        prompts = prompts if len(prompts) >= FEWEST_CAPTIONS else None
    if prompts is not None:
        return list(prompts[::2]), list(prompts[1::2]), source
    data = files("seal_fast.text_triggers") / "data"
    training, held_out = (
        (data / f"{name}_prompts.txt").read_text(encoding="utf-8").splitlines() for name in ("training", "held_out")
    )
    return training, held_out, "shipped"
