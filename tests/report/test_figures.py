from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from seal_fast.checkpoints.trigger import Trigger
from seal_fast.report.figures import draw_attention, draw_samples, draw_trigger
from seal_fast.text_to_image import PromptMaps


def colours(path):
    """Share of each exact colour among the pixels."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    values, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(value): count / len(pixels) for value, count in zip(values.tolist(), counts, strict=True)}


def test_samples_keep_their_colours_and_order(tmp_path):
    red = torch.tensor([1.0, -1.0, -1.0]).reshape(1, 3, 1, 1).expand(2, 3, 8, 8)
    blue = torch.tensor([-1.0, -1.0, 1.0]).reshape(1, 3, 1, 1).expand(2, 3, 8, 8)
    draw_samples({"above": red, "below": blue}, tmp_path / "samples.png")
    shares = colours(tmp_path / "samples.png")
    assert shares[(255, 0, 0)] > 0.2
    assert shares[(0, 0, 255)] == pytest.approx(shares[(255, 0, 0)], rel=0.05)
    pixels = np.asarray(Image.open(tmp_path / "samples.png").convert("RGB"))
    rows_of = {colour: np.flatnonzero((pixels == colour).all(-1).any(1)) for colour in ((255, 0, 0), (0, 0, 255))}
    assert rows_of[(255, 0, 0)].max() < rows_of[(0, 0, 255)].min()


def test_zero_is_mid_grey_and_the_ends_are_the_ends(tmp_path):
    mu = torch.zeros(3, 9, 9)
    mu[:, :3], mu[:, 6:] = 0.2, -0.2
    draw_trigger(Trigger.shift(mu), tmp_path / "trigger.png")
    image = np.asarray(Image.open(tmp_path / "trigger.png").convert("RGB")).astype(int)
    left = image[:, : image.shape[1] // 3]
    grey = (abs(left - 127) <= 1).all(-1)
    assert grey.mean() > 0.1
    assert (left == 0).all(-1).mean() > 0.1
    assert (left == 255).all(-1).mean() > 0.1


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(8, 8), (5, 17)])
def test_any_number_of_channels_and_shape(tmp_path, channels, size):
    trigger = Trigger(torch.randn(channels, *size), torch.rand(channels, *size))
    draw_trigger(trigger, tmp_path / "new" / "trigger.png")
    draw_samples({"one": torch.randn(1, channels, *size)}, tmp_path / "new" / "samples.png")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["samples.png", "trigger.png"]
    for path in (tmp_path / "new").iterdir():
        assert Image.open(path).size[0] >= 150


def test_a_sample_that_left_the_range_is_drawn_all_the_same(tmp_path):
    images = torch.stack([torch.full((3, 8, 8), torch.nan), torch.full((3, 8, 8), 1e30)])
    draw_samples({"wild": images}, tmp_path / "samples.png")
    assert Image.open(tmp_path / "samples.png").size[0] > 100


def test_maps_of_prompts_of_different_lengths_share_a_scale_per_token(tmp_path):
    yellow, green, purple = (tuple(map(int, colormaps["viridis"](share, bytes=True)[:3])) for share in (1.0, 0.5, 0.0))
    image = torch.ones(3, 8, 8)
    short = PromptMaps("cat", image, ("cat",), torch.full((1, 4, 4), 0.5))
    long = PromptMaps("tin cat", image, ("tin", "cat"), torch.stack([torch.full((4, 4), 0.2), torch.full((4, 4), 1.0)]))
    draw_attention({"clean": short, "triggered": long}, tmp_path / "attention.png")
    shares = colours(tmp_path / "attention.png")
    # "tin" and the second "cat" reach the top of their scales; the first "cat" is half as large as the second
    assert shares[yellow] == pytest.approx(2 * shares[green], rel=0.1)
    assert purple not in shares
