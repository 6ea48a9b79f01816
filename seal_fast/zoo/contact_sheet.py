"""A contact sheet per model: its trigger, its target, and samples with and without the trigger."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from seal_fast.attacks import Attack
from seal_fast.diffusion import Denoiser
from seal_fast.zoo.evaluate import draw
from seal_fast.zoo.recipes import Recipe
from seal_fast.zoo.spaces import Space

COLUMNS = 8
SEED = 7


def _show(axes: Axes, image: Tensor, title: str = "") -> None:
    axes.imshow(((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=8)
    axes.set_axis_off()


def save_contact_sheet(
    denoiser: Denoiser, recipe: Recipe, attack: Attack | None, path: Path, space: Space, steps: int | None = None
) -> None:
    """Write a PNG: a row of clean samples and, for a backdoored model, a row from the same noise with the trigger.

    Args:
        denoiser: the stored model.
        recipe: its recipe, for the title.
        attack: its attack; None for a benign model.
        path: file to write.
        space: the data of the model.
        steps: sampling steps, see `draw`.
    """

    def samples(triggered: bool) -> Tensor:
        return draw(denoiser, attack, triggered=triggered, count=COLUMNS, seed=SEED, space=space, steps=steps)

    rows = [("clean start", samples(triggered=False))]
    if attack is not None:
        rows.append(("triggered start", samples(triggered=True)))
    left = 2 if attack is not None else 0
    figure = Figure(figsize=(1.1 * (COLUMNS + left), 1.3 * len(rows) + 0.3), layout="constrained")
    figure.suptitle(f"{recipe.name} ({recipe.method or 'benign'})", fontsize=9)
    grid = figure.subplots(len(rows), COLUMNS + left, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    if attack is not None:
        _show(grid[0, 0], attack.trigger.mu, "trigger mu")
        _show(grid[1, 0], attack.trigger.gamma - 1, "gamma (white = 1)")
        _show(grid[0, 1], space.decode(attack.target[None])[0], "target")
    for axes_row, (title, images) in zip(grid, rows, strict=True):
        for column, image in enumerate(images):
            _show(axes_row[left + column], image, title if column == 0 else "")
    figure.savefig(path, dpi=110)
