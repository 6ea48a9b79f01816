"""Draw the README's image, docs/overview.png, from the results of `make demo`.

python docs/overview.py [demo-results/scan] [docs/overview.png]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from seal_fast.checkpoints import load_denoiser
from seal_fast.checkpoints.trigger import Trigger
from seal_fast.workflows.trigger_files import sample_images
from seal_fast.zoo.recipes import RECIPES

COLUMNS = ("attacker's trigger", "recovered trigger", "target", "clean noise", "with the recovered trigger")
ZOO = Path("zoo")


def show(axes: Axes, image: Tensor | None) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(image is not None)
    if image is not None:
        axes.imshow((image.clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0).numpy(), interpolation="nearest")


def tiled(images: Tensor) -> Tensor:
    """Four images in a square."""
    first, second, third, fourth = images
    return torch.cat([torch.cat([first, second], 2), torch.cat([third, fourth], 2)], 1)


def main(results: Path, path: Path) -> None:
    report = json.loads((results / "report.json").read_text())
    models = [model for model in report["models"] if model["detector"] == "noise"]
    recipes = {recipe.name: recipe for recipe in RECIPES}
    figure = Figure(figsize=(10.6, 1.75 * len(models) + 0.5), layout="constrained")
    grid = figure.subplots(len(models), len(COLUMNS), squeeze=False)
    for cells, model in zip(grid, models, strict=True):
        name = Path(model["path"]).name
        attack = recipes[name].attack(ZOO / name)
        trigger = Trigger.load(results / model["trigger"])
        drawn = list(sample_images(load_denoiser(ZOO / name).denoiser, trigger, seed=0).values())
        images = (
            attack.trigger.mu if attack else None,
            trigger.mu,
            attack.target if attack else None,
            *(tiled(images) for images in drawn),
        )
        for axes, image in zip(cells, images, strict=True):
            show(axes, image)
        cells[0].set_ylabel(f"{name}\n{model['verdict']}", fontsize=10)
    for axes, title in zip(grid[0], COLUMNS, strict=True):
        axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    torch.manual_seed(0)
    defaults = Path("demo-results/scan"), Path("docs/overview.png")
    given = tuple(Path(argument) for argument in sys.argv[1:])
    main(*given, *defaults[len(given) :])
