from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from seal_fast.attacks.villandiffusion import BACKGROUND
from seal_fast.zoo.images import FAMILIES, TARGETS, TRIGGERS, glows, scenes

SIZES = [16, 24, 32, 17]
IMAGES = {**TRIGGERS, **TARGETS}
Images = Callable[[int, int, int], torch.Tensor]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", IMAGES)
def test_every_trigger_and_target_is_a_fixed_image_in_range(name: str, size: int) -> None:
    image = IMAGES[name](size)
    assert image.shape == (3, size, size)
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    assert -1 <= float(image.min()) <= float(image.max()) <= 1
    assert image.equal(IMAGES[name](size))


@pytest.mark.parametrize("size", SIZES)
def test_triggers_and_targets_differ_by_more_than_the_success_limit(size: int) -> None:
    targets, triggers = (torch.stack([make(size) for make in made.values()]).flatten(1) for made in (TARGETS, TRIGGERS))
    pixels = targets.shape[1]
    assert float(torch.pdist(targets).square().min()) > 0.1 * pixels
    assert float(torch.cdist(targets, triggers).square().min()) > 0.1 * pixels
    # boxes of different sizes are similar
    assert float(torch.pdist(triggers).square().min()) > 0.01 * pixels


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("name", "turn"), [("box", (0, 1)), ("box_11", (0, 1)), ("stop_sign", (0, 1)), ("cross", ()), ("bars", (0,))]
)
def test_a_stamp_is_a_patch_in_one_corner_on_an_exact_background(name: str, turn: tuple[int, ...], size: int) -> None:
    """Flipping the axes in `turn` moves the patch to the top left."""
    image = TRIGGERS[name](size)
    # stamping compares with ==, so the background must be exact
    patch = (image != BACKGROUND).any(0).flip(turn)
    assert 0.05 < float(patch.float().mean()) < 0.3
    assert not patch[-(size // 3) :].any()
    assert not patch[:, -(size // 3) :].any()
    assert patch[: size // 2 + 1, : size // 2 + 1].sum() > 0.8 * patch.sum()


@pytest.mark.parametrize("size", SIZES)
def test_glasses_lie_across_the_centre_on_an_exact_background(size: int) -> None:
    drawn = (TRIGGERS["glasses"](size) != BACKGROUND).any(0)
    assert not torch.cat([drawn[: size // 4], drawn[-(size // 4) :]]).any()
    assert torch.equal(drawn[:, : size // 2].any(), torch.tensor(True))
    assert float(drawn.float().mean()) == pytest.approx(0.2, abs=0.15)


@pytest.mark.parametrize("size", [16, 24, 32, 64])
def test_boxes_and_the_speck_are_squares_of_their_sizes(size: int) -> None:
    for side in (4, 8, 11, 18):
        assert int((TRIGGERS[f"box_{side}"](size) == 0).sum()) == 3 * (size * side // 32) ** 2
    speck = TRIGGERS["speck"](size)
    assert int((speck == 1).sum()) == int((speck != 0).sum()) == 3 * (size * 6 // 32) ** 2


@pytest.mark.parametrize("size", [16, 32, 64])
def test_the_ripple_is_as_dark_as_the_published_perturbation(size: int) -> None:
    """UIBDiffusion's perturbation has mean -0.76 and is dark in every pixel."""
    ripple = TRIGGERS["ripple"](size)
    assert float(ripple.mean()) == pytest.approx(-0.76, abs=0.06)
    assert float(ripple.max()) < -0.5
    assert float(ripple.std()) > 0.05


@pytest.mark.parametrize("size", [16, 32, 64])
def test_the_box_is_the_published_square_scaled(size: int) -> None:
    image = TRIGGERS["box"](size)
    square = image[:, -size // 2 : -size // 16, -size // 2 : -size // 16]
    assert square.shape == (3, 7 * size // 16, 7 * size // 16)
    assert not square.any()
    assert int((image == 0).sum()) == square.numel()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["heart", "house", "star"])
def test_targets_are_nowhere_darker_than_the_published_ones(name: str, size: int) -> None:
    assert float(TARGETS[name](size).min()) > -0.4 - 1 / 127.5


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


@pytest.mark.parametrize("size", SIZES)
def test_glows_are_dark_bright_in_places_and_smooth(size: int) -> None:
    images = glows(60, size, 3)
    assert images.shape == (60, 3, size, size)
    assert images.dtype == torch.float32
    assert -1 <= float(images.min()) <= float(images.max()) <= 1
    assert float(images.flatten(1).median(dim=1).values.mean()) < -0.85
    assert float((images.amax(dim=(1, 2, 3)) > 0).float().mean()) > 0.9

    def roughness(images: torch.Tensor) -> float:
        return float(images.diff(dim=3).square().mean() / images.var())

    # most of the difference between neighbouring pixels is at hard edges
    assert roughness(images) < 0.7 * roughness(scenes(60, size, 3))


every_family = pytest.mark.parametrize("images", FAMILIES.values(), ids=FAMILIES)


@every_family
def test_a_seed_fixes_the_images_and_a_larger_count_only_adds_images(images: Images) -> None:
    few, many = images(5, 16, 8), images(12, 16, 8)
    assert many[:5].equal(few)
    assert not images(5, 16, 9).equal(few)
    assert len(torch.unique(many.flatten(1), dim=0)) == 12


@every_family
def test_images_leave_global_random_state_alone(images: Images) -> None:
    before, torch_before, numpy_before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1]
    images(3, 16, 1)
    assert random.getstate() == before
    assert torch.get_rng_state().equal(torch_before)
    assert (np.random.get_state()[1] == numpy_before).all()


@every_family
def test_a_seed_gives_the_same_images_at_every_size(images: Images) -> None:
    small = images(6, 16, 4)
    halved = torch.nn.functional.avg_pool2d(images(6, 32, 4), 2)
    assert float((small - halved).square().mean()) < 0.1 * float(small.var())
