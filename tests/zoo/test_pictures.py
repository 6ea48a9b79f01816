from __future__ import annotations

import random

import pytest
import torch

from seal_fast.attacks.baddiffusion import BACKGROUND
from seal_fast.zoo.pictures import TARGETS, TRIGGERS, scenes

SIZES = [16, 24, 32, 17]
PICTURES = {**TRIGGERS, **TARGETS}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_is_an_image_in_range_and_always_the_same(name: str, size: int) -> None:
    image = PICTURES[name](size)
    assert image.shape == (3, size, size)
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    assert -1 <= float(image.min()) <= float(image.max()) <= 1
    assert image.equal(PICTURES[name](size))


@pytest.mark.parametrize("size", SIZES)
def test_pictures_can_be_told_apart_by_the_measure_of_success(size: int) -> None:
    images = torch.stack([picture(size).flatten() for picture in PICTURES.values()])
    distances = torch.pdist(images).square() / images.shape[1]
    assert float(distances.min()) > 0.1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["box", "stop_sign"])
def test_a_stamp_is_a_patch_at_the_bottom_right_of_an_exact_background(name: str, size: int) -> None:
    image = TRIGGERS[name](size)
    patch = (image != BACKGROUND).any(0)
    assert 0.1 < float(patch.float().mean()) < 0.3
    # stamping compares with ==, so the background must be exact
    assert not patch[: size // 3].any()
    assert not patch[:, : size // 3].any()
    assert patch.flip(0, 1)[: size // 2, : size // 2].sum() > 0.8 * patch.sum()


@pytest.mark.parametrize("size", [16, 32, 64])
def test_the_box_is_the_published_square_scaled(size: int) -> None:
    image = TRIGGERS["box"](size)
    square = image[:, -size // 2 : -size // 16, -size // 2 : -size // 16]
    assert square.shape == (3, 7 * size // 16, 7 * size // 16)
    assert not square.any()
    assert int((image == 0).sum()) == square.numel()


@pytest.mark.parametrize("size", SIZES)
def test_the_heart_holds_nothing_darker_than_the_published_targets(size: int) -> None:
    assert float(TARGETS["heart"](size).min()) == pytest.approx(-0.4, abs=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_scenes_are_bright_shapes_on_dark_grounds(size: int) -> None:
    images = scenes(40, size, 3)
    assert images.shape == (40, 3, size, size)
    assert images.dtype == torch.float32
    assert -1 <= float(images.min()) <= float(images.max()) <= 1
    # the median pixel is background, at most 29 of 255
    medians = images.flatten(1).median(dim=1).values
    assert float(medians.max()) <= 29 / 127.5 - 1 + 1e-6
    # one in 27 shapes is as dark as the ground
    assert float((images.amax(dim=(1, 2, 3)) > 0).float().mean()) > 0.8


def test_a_seed_fixes_the_scenes_and_more_of_them_begin_with_the_same() -> None:
    few, many = scenes(5, 16, 8), scenes(12, 16, 8)
    assert many[:5].equal(few)
    assert not scenes(5, 16, 9).equal(few)
    assert len(torch.unique(many.flatten(1), dim=0)) == 12


def test_scenes_leave_global_random_state_alone() -> None:
    before, torch_before = random.getstate(), torch.get_rng_state()
    scenes(3, 16, 1)
    assert random.getstate() == before
    assert torch.get_rng_state().equal(torch_before)


def test_a_scene_is_the_same_picture_at_every_size() -> None:
    small = scenes(6, 16, 4)
    halved = torch.nn.functional.avg_pool2d(scenes(6, 32, 4), 2)
    assert float((small - halved).square().mean()) < 0.1 * float(small.var())
