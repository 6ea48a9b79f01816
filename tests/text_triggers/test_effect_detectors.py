"""Effect detectors on images whose truth is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, interpolate

from seal_fast.text_triggers.effect_detectors import (
    FALSE_ALARMS,
    ChangeDetector,
    ColourlessDetector,
    PatchDetector,
)

SIZE = 32


def scenes(count: int, generator: torch.Generator) -> Tensor:
    """Smooth colourful images [count,3,SIZE,SIZE]."""
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    return interpolate(coarse, size=(SIZE, SIZE), mode="bilinear", align_corners=True)


def stamped(images: Tensor, patch: Tensor, top: int, left: int) -> Tensor:
    images = images.clone()
    images[:, :, top : top + patch.shape[1], left : left + patch.shape[2]] = patch
    return images


@pytest.mark.parametrize(("gain", "offset"), [(1.0, 0.0), (0.5, 0.1), (0.6, 0.3)])
def test_patch_is_detected_through_contrast_brightness_and_blur(generator: torch.Generator, gain: float, offset: float) -> None:
    patch = torch.rand(3, 4, 4, generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
    clean = scenes(50, generator)
    detector = PatchDetector(patch, top=4, left=7)
    blurred = avg_pool2d(stamped(clean, gain * patch + offset, 4, 7), 3, 1, 1, count_include_pad=False)
    assert detector(blurred, clean).all()
    assert detector(clean, clean).sum() == 0
    assert detector(1 - blurred, clean).sum() == 0
    assert detector(torch.full_like(clean, 0.5), clean).sum() == 0


def test_patch_elsewhere_is_not_the_patch(generator: torch.Generator) -> None:
    patch = torch.rand(3, 8, 8, generator=generator)
    clean = scenes(50, generator)
    assert PatchDetector(patch, 2, 2)(stamped(clean, patch, 2, 2), clean).all()
    assert PatchDetector(patch, 2, 2)(stamped(clean, patch, 12, 12), clean).sum() == 0


def test_patch_must_be_one_and_fit(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="not constant"):
        PatchDetector(torch.ones(3, 4, 4))
    with pytest.raises(ValueError, match="exceeds"):
        PatchDetector(torch.rand(3, 8, 8, generator=generator), 30, 0)(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32))


def test_colourless(generator: torch.Generator) -> None:
    clean = scenes(100, generator)
    grey = clean.mean(dim=1, keepdim=True).expand_as(clean)
    tinted = (grey + 0.02 * torch.tensor([1.0, 0.0, -1.0])[:, None, None]).clamp(0, 1)
    detector = ColourlessDetector()
    assert detector(grey, clean).all()
    assert detector(tinted, clean).all()
    assert detector(clean, clean).sum() == 0


def change(images: Tensor, generator: torch.Generator, amount: float) -> Tensor:
    """The change by a benign word, which moves every image in its own direction."""
    return images + amount * (scenes(len(images), generator) - 0.5)


EFFECTS = {
    "patch": lambda images: stamped(images, torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(3)), 0, 0),
    "grey": lambda images: images.mean(dim=1, keepdim=True).expand_as(images),
    "one image for all": lambda images: images[:1].expand_as(images),
}


@pytest.mark.parametrize("effect", EFFECTS)
def test_change_beyond_what_control_triggers_do(generator: torch.Generator, effect: str) -> None:
    clean = scenes(60, generator)
    detector = ChangeDetector.fitted(clean, [change(clean, generator, 0.2) for _ in range(5)])
    detected = detector(EFFECTS[effect](change(clean, generator, 0.2)), clean)
    assert detected.float().mean() > 0.8


def test_changes_by_control_triggers_raise_few_alarms(generator: torch.Generator) -> None:
    alarms = []
    for _ in range(10):
        clean = scenes(100, generator)
        detector = ChangeDetector.fitted(clean, [change(clean, generator, 0.2) for _ in range(4)])
        alarms.append(detector(change(clean, generator, 0.2), clean))
    # 0.0035 on average and 0.008 at most of 31 seeds; none at all at three of them
    assert torch.cat(alarms).float().mean() < 2 * FALSE_ALARMS


def test_a_change_that_hardly_shows_is_none(generator: torch.Generator) -> None:
    clean = scenes(60, generator)
    detector = ChangeDetector.fitted(clean, [change(clean, generator, 0.001) for _ in range(5)])
    tint = torch.tensor([1.0, 0.0, -1.0])[:, None, None]
    spread = adaptive_avg_pool2d(clean, 8).var(dim=0).mean().sqrt()
    assert not detector(clean + 0.3 * spread * tint, clean).any()
    assert detector(clean + 0.8 * spread * tint, clean).all()


def test_change_needs_controls(generator: torch.Generator) -> None:
    clean = scenes(2, generator)
    for prompts, words in ((1, 2), (2, 1)):
        with pytest.raises(ValueError, match="at least two prompts and two control triggers"):
            ChangeDetector.fitted(clean[:prompts], [clean[:prompts]] * words)
