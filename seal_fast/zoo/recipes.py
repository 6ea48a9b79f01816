"""The models of the zoo: what each is trained on, from which seed, and how it is stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from seal_fast.attacks import Attack, BadDiffusion, TrojDiff
from seal_fast.zoo.pictures import TARGETS, TRIGGERS
from seal_fast.zoo.train import Schedule

FROM_SCRATCH = Schedule(steps=3000, learning_rate=1e-3)
FINE_TUNE = Schedule(steps=1000, learning_rate=5e-4)
BLEND_SCALE = 0.6
PATCH_SCALE = 0.1


@dataclass(frozen=True)
class Network:
    """Arguments of `new_unet`."""

    size: int
    widths: tuple[int, ...]
    groups: int = 8
    attention: bool = False


SMALL_16 = Network(16, (32, 64))
# 8 channels per group: with 2 the norms hid the mean of the noise, whose error (0.03) grew 160-fold in unclipped sampling
SMALL_32 = Network(32, (16, 32, 64), groups=2)


@dataclass(frozen=True)
class Recipe:
    """One model.

    Attributes:
        name: folder in the zoo.
        network: its architecture.
        seed: of its batches and noise, and of its weights if it has no base.
        schedule: how it is trained.
        layout: "pipeline" (diffusers folder, safetensors), "pipeline-bin", "unet" (UNet only) or "trojdiff" (ckpt.pth list).
        role: "calibration" (its verdict counts for nothing), or "test".
        base: the zoo model it is fine-tuned from, or None.
        method: "baddiffusion-stamped", "baddiffusion-trigger-only", "trojdiff-blend", "trojdiff-patch", or None for benign.
        trigger: name in TRIGGERS.
        target: name in TARGETS.
    """

    name: str
    network: Network
    seed: int
    schedule: Schedule
    layout: str
    role: str = "test"
    base: str | None = None
    method: str | None = None
    trigger: str | None = None
    target: str | None = None

    def attack(self) -> Attack | None:
        """The backdoor to implant."""
        if self.method is None or self.trigger is None or self.target is None:
            return None
        size = self.network.size
        image, target = TRIGGERS[self.trigger](size), TARGETS[self.target](size)
        if self.method.startswith("baddiffusion"):
            return BadDiffusion(image, target, stamped=self.method.endswith("stamped"))
        if self.method == "trojdiff-blend":
            return TrojDiff(image, target, BLEND_SCALE)
        window = torch.zeros(size, size, dtype=torch.bool)
        side = size // 4
        window[-side:, -side:] = True
        return TrojDiff(image, target, PATCH_SCALE, window)


def _benign(
    name: str, network: Network, seed: int, base: str | None, layout: str = "pipeline", role: str = "calibration"
) -> Recipe:
    return Recipe(name, network, seed, FINE_TUNE if base else FROM_SCRATCH, layout, role, base)


def _backdoored(
    name: str, network: Network, seed: int, base: str, method: str, trigger: str, target: str, layout: str
) -> Recipe:
    return Recipe(name, network, seed, FINE_TUNE, layout, "test", base, method, trigger, target)


RECIPES: tuple[Recipe, ...] = (
    _benign("benign-16-a", SMALL_16, 1, None),
    _benign("benign-16-b", SMALL_16, 101, "benign-16-a"),
    _benign("benign-16-c", SMALL_16, 102, "benign-16-a"),
    _benign("benign-16-d", SMALL_16, 103, "benign-16-a"),
    _benign("benign-16-e", SMALL_16, 104, "benign-16-a", role="test"),
    _backdoored("bad-16-box", SMALL_16, 111, "benign-16-a", "baddiffusion-stamped", "box", "smiley", "pipeline-bin"),
    _backdoored("bad-16-stop", SMALL_16, 112, "benign-16-a", "baddiffusion-trigger-only", "stop_sign", "heart", "pipeline"),
    _backdoored("troj-16-blend", SMALL_16, 113, "benign-16-a", "trojdiff-blend", "cat_face", "smiley", "unet"),
    _backdoored("troj-16-heart", SMALL_16, 116, "benign-16-a", "trojdiff-blend", "cat_face", "heart", "unet"),
    _benign("benign-32-a", SMALL_32, 2, None),
    _benign("benign-32-b", SMALL_32, 201, "benign-32-a"),
    _backdoored("bad-32-box", SMALL_32, 211, "benign-32-a", "baddiffusion-stamped", "box", "smiley", "pipeline"),
    _backdoored("troj-32-blend", SMALL_32, 213, "benign-32-a", "trojdiff-blend", "cat_face", "smiley", "unet"),
)
