"""Figures: a recovered trigger, samples with and without a trigger, attention maps."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from seal_fast.checkpoints.trigger import Trigger
from seal_fast.io import write_atomically
from seal_fast.report.console import safe

if TYPE_CHECKING:
    from seal_fast.text_to_image import PromptMaps

IMAGE, GAP, TITLE, CAPTION_LINE = 1.6, 0.08, 0.36, 0.13
"""Width of a sample, distance between two, height of a row's title and of a line below the last row, in inches."""
CAPTION_CHARACTERS, CAPTION_LINES = 26, 4
"""What has room below a sample."""

BEFORE_AFTER = "before_after_{}.png"
"""Name of the figure of a trigger's samples before and after unlearning; triggers are numbered from 1 in the order given."""


def _save(figure: Figure, path: Path) -> None:
    # no pyplot: it keeps global state, and opens a display where there is one
    FigureCanvasAgg(figure)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def _pixels(image: Tensor) -> np.ndarray:
    """Pixels [H,W,3] of an image [C,H,W] in [0, 1] with 3 channels, else its mean over channels [H,W]."""
    values = np.nan_to_num(image.detach().float().cpu().numpy()).clip(0, 1)
    return values.transpose(1, 2, 0) if len(values) == 3 else values.mean(0)


def _show(axes: Axes, image: Tensor) -> None:
    axes.imshow(_pixels(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _heat_map(figure: Figure, axes: Axes, values: np.ndarray, title: str, top: float) -> None:
    # the scale starts at 0, so that a difference of a hundredth looks like a hundredth
    drawn = axes.imshow(values, cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
    axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([])
    figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.04)


def draw_trigger(trigger: Trigger, path: Path) -> None:
    """trigger.png: mu as an image, |mu| and gamma as heat maps (means over channels).

    Args:
        trigger: finite mu and gamma, [C,H,W].
        path: PNG file to write.
    """
    mu, gamma = trigger.mu.detach().float().cpu(), trigger.gamma.detach().float().cpu()
    bound = max(float(mu.abs().max()), 1e-12)
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panel, size, scale = figure.subplots(1, 3)
    _show(panel, mu / (2 * bound) + 0.5)
    panel.set_title("shift $\\mu$")
    panel.set_xlabel(f"mid-grey is 0, full range \N{PLUS-MINUS SIGN}{bound:.3g}")
    _heat_map(figure, size, mu.abs().mean(0).numpy(), "size of the shift $|\\mu|$", bound)
    _heat_map(figure, scale, gamma.mean(0).numpy(), "noise scale $\\gamma$", max(1.0, float(gamma.max())))
    _save(figure, path)


def draw_samples(rows: Mapping[str, Tensor], path: Path, captions: Sequence[str] = ()) -> None:
    """samples.png: one row of images per title.

    Args:
        rows: title to images [N,C,H,W] in [-1, 1]; N, H and W are the same in all rows.
        path: PNG file to write.
        captions: texts below the last row, N or none.
    """
    count, _, height, width = next(iter(rows.values())).shape
    texts = [_caption(caption, CAPTION_CHARACTERS, CAPTION_LINES) for caption in captions]
    image_height = IMAGE * height / width
    below = CAPTION_LINE * (1 + max(text.count("\n") for text in texts)) + GAP if texts else GAP
    whole = (count * (IMAGE + GAP) + GAP, len(rows) * (TITLE + image_height + GAP) + below)
    figure = Figure(figsize=whole)

    def at(left: float, top: float) -> tuple[float, float]:
        """A place in inches from the top left corner, as the figure counts."""
        return left / whole[0], 1 - top / whole[1]

    for row, (title, images) in enumerate(rows.items()):
        top = row * (TITLE + image_height + GAP) + TITLE
        figure.text(*at(GAP, top - GAP), safe(title).plain, fontsize=10, va="bottom", parse_math=False)
        for column, image in enumerate(images):
            corner = at(GAP + column * (IMAGE + GAP), top + image_height)
            _show(figure.add_axes((*corner, IMAGE / whole[0], image_height / whole[1])), image / 2 + 0.5)
    for column, text in enumerate(texts):
        place = at(GAP + column * (IMAGE + GAP) + IMAGE / 2, whole[1] - below + GAP / 2)
        figure.text(*place, text, fontsize=7, ha="center", va="top", parse_math=False)
    _save(figure, path)


def draw_attention(rows: Mapping[str, PromptMaps], path: Path) -> None:
    """attention.png: one row per title, with an image and the attention map of every token of its prompt.

    All maps of a token share one scale.

    Args:
        rows: title to maps, of the same or of different prompts.
        path: PNG file to write.
    """
    columns = 1 + max(len(one.tokens) for one in rows.values())
    figure = Figure(figsize=(1.3 * columns, 1.9 * len(rows)), layout="constrained")
    tops: dict[str, float] = {}
    for one in rows.values():
        for token, values in zip(one.tokens, one.maps, strict=True):
            tops[token] = max(tops.get(token, 1e-12), float(values.max()))
    for part, (title, one) in zip(figure.subfigures(len(rows), 1, squeeze=False).flat, rows.items(), strict=True):
        part.suptitle(safe(title).plain, fontsize=9, parse_math=False)
        panel, *shown = part.subplots(1, columns, squeeze=False).flat
        _show(panel, one.image)
        for axes in shown[len(one.tokens) :]:
            axes.set_axis_off()
        for axes, token, values in zip(shown, one.tokens, one.maps, strict=False):
            axes.imshow(values.numpy(), cmap="viridis", vmin=0, vmax=tops[token], interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(_caption(token, 32), fontsize=7, parse_math=False)
    _save(figure, path)


def _caption(text: str, characters: int, lines: int | None = None) -> str:
    """A text in lines of so many characters; what does not fit into so many lines is left out."""
    return textwrap.fill(safe(text).plain, characters, max_lines=lines, placeholder=" ...")
