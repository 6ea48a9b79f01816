"""Draw zoo-text/contact.png: what every backdoored model of the repository draws without its trigger and with it.

    python -m benchmarks.text_contact_sheet [--zoo zoo-text] [--out zoo-text/contact.png]

A row per trigger: held-out prompts, then the same prompts with the trigger, from the same noise. Models with CLIP's tokenizer
need open_clip_torch.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from seal_fast.io import write_atomically
from seal_fast.text_triggers.trigger import PLACES
from seal_fast.zoo.build import read_manifest
from seal_fast.zoo.build_text import load_text_model
from seal_fast.zoo.evaluate_text import draw, held_out_scenes
from seal_fast.zoo.text_effects import Effect
from seal_fast.zoo.text_recipes import TEXT_RECIPES, TextRecipe

PROMPTS = 4
LABEL, SIDE, GAP, HEAD = 2.1, 0.9, 0.05, 0.25
"""Width of a row's label, side of an image, distance between two, and height of the head of the columns, in inches."""
DPI = 80
COLOURS = 128
"""Colours of the file. All of them would take three times as many bytes."""


@dataclass(frozen=True)
class Row:
    """Images of a model with one trigger.

    Attributes:
        label: what is shown, in lines.
        clean: images [PROMPTS,3,64,64] in [-1, 1] of held-out prompts.
        triggered: images of the same prompts with the trigger.
    """

    label: str
    clean: Tensor
    triggered: Tensor


def rows(zoo: Path) -> Iterator[Row]:
    """A row per trigger of the models in the zoo's manifest."""
    present = {entry["name"] for entry in read_manifest(zoo)}
    for recipe in TEXT_RECIPES:
        if recipe.name in present and recipe.effects:
            pipeline = load_text_model(recipe.name, zoo)
            for effect in recipe.effects:
                prompts = [scene.caption for scene in held_out_scenes(PROMPTS, recipe.seed, effect)]
                images = draw(pipeline, prompts, recipe.seed), draw(pipeline, list(map(effect.trigger, prompts)), recipe.seed)
                yield Row(label(recipe, effect), *images)


def label(recipe: TextRecipe, effect: Effect) -> str:
    where = f"{effect.text.quoted} {PLACES[effect.place]}"
    return f"{recipe.name}\n{where}\n{effect.name}, {recipe.module.replace('_', ' ')}"


def contact_sheet(shown: Iterable[Row]) -> Image.Image:
    """The sheet in COLOURS colours."""
    drawn = list(shown)
    width, height = LABEL + 2 * PROMPTS * (SIDE + GAP) + 2 * GAP, HEAD + len(drawn) * (SIDE + GAP)
    figure = Figure(figsize=(width, height), dpi=DPI)
    for half, title in enumerate(("held-out prompts", "the same prompts with the trigger")):
        figure.text(_left(half * PROMPTS) / width, 1 - HEAD / 2 / height, title, fontsize=9, va="center")
    for number, row in enumerate(drawn):
        bottom = 1 - (HEAD + (number + 1) * (SIDE + GAP) - GAP) / height
        middle = bottom + SIDE / 2 / height
        figure.text(GAP / width, middle, row.label, fontsize=7, va="center", parse_math=False)
        for column, image in enumerate((*row.clean, *row.triggered)):
            axes = figure.add_axes((_left(column) / width, bottom, SIDE / width, SIDE / height))
            axes.imshow((image.clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_axis_off()
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=DPI)
    return Image.open(buffer).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)


def _left(column: int) -> float:
    """Left end of an image, in inches; the two halves stand apart."""
    return LABEL + column * (SIDE + GAP) + 2 * GAP * (column >= PROMPTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, default=Path("zoo-text"))
    parser.add_argument("--out", type=Path, default=Path("zoo-text/contact.png"))
    options = parser.parse_args()
    sheet = contact_sheet(rows(options.zoo))
    write_atomically(options.out, lambda temporary: sheet.save(temporary, format="PNG", optimize=True))


if __name__ == "__main__":
    main()
