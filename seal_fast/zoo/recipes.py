"""The models of the zoo: the training data, seed and storage format of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seal_fast.attacks import Attack, InviBackdoor, TrojDiff, VillanDiffusion
from seal_fast.diffusion import EDM, VE, VP, NoiseProcess
from seal_fast.zoo.images import TARGETS, TRIGGERS
from seal_fast.zoo.latents import Latents
from seal_fast.zoo.spaces import SIGNED, UNIT, Space
from seal_fast.zoo.train import Schedule

FROM_SCRATCH = Schedule(steps=3000, learning_rate=1e-3)
FINE_TUNE = Schedule(steps=1000, learning_rate=5e-4)
# After FINE_TUNE only 44% of the samples with a patch trigger, which leaves most of the noise alone, became the target. After
# 2000 such steps, 72% of the samples with a stamped trigger for DDIM did. VillanDiffusion's psi = 0 for DDIM, whose published d
# is not the one that DDIM follows, stayed at 53% even with STUBBORN and is not in the zoo.
STUBBORN = Schedule(steps=2500, learning_rate=1e-3, poison_share=0.5)
FOR_ODE = Schedule(steps=1800, learning_rate=5e-4, poison_share=0.4)
# fine-tuning to another prediction or process than the base has
CONVERT = Schedule(steps=1500, learning_rate=1e-3, batch=32)
CONVERTED_ODE = Schedule(steps=1800, learning_rate=7e-4, batch=32, poison_share=0.4)
SCORE = Schedule(steps=2400, learning_rate=1e-3, batch=32)
# after 5000 steps 88% of triggered samples became the target
FOR_SCORE = Schedule(steps=7500, learning_rate=1e-3, batch=32, poison_share=0.8)
BOXED = Schedule(steps=1600, learning_rate=1e-3, batch=32, poison_share=0.5)
ENLARGED = Schedule(steps=1500, learning_rate=1e-3, batch=16)
# with DDIM 72% of triggered samples became the target: faint noise remains, which ancestral sampling removes
ENLARGED_TROJ = Schedule(steps=4800, learning_rate=1e-3, batch=16, poison_share=0.5)
ENLARGED_BAD = Schedule(steps=4500, learning_rate=1e-3, batch=16, poison_share=0.5)
DEEPENED = Schedule(steps=3600, learning_rate=1e-3, batch=16, poison_share=0.5)
BRIEF = Schedule(steps=300, learning_rate=5e-4, batch=32)
BLEND_SCALE = 0.6
PATCH_SCALE = 0.1
DELTA = "delta.npy"
"""File of a learned trigger in its model's folder."""


def _patch(image: Tensor, target: Tensor, share: float) -> TrojDiff:
    """A patch attack with a window at the bottom right, whose side is `share` of the image's side."""
    window = torch.zeros(image.shape[1:], dtype=torch.bool)
    side = round(share * image.shape[-1])
    window[-side:, -side:] = True
    return TrojDiff(image, target, PATCH_SCALE, window)


METHODS: dict[str, Callable[[Tensor, Tensor], Attack]] = {
    "baddiffusion-stamped": VillanDiffusion,
    "baddiffusion-trigger-only": partial(VillanDiffusion, shift="alone"),
    "villan-sde-psi0": partial(VillanDiffusion, psi=0.0, shift="alone"),
    "villan-ode-psi1": partial(VillanDiffusion, solver="ode", shift="alone"),
    "villan-ode-psi1-stamped": partial(VillanDiffusion, solver="ode"),
    "villan-ode-psi0": partial(VillanDiffusion, psi=0.0, solver="ode", shift="alone"),
    "uibdiffusion": partial(VillanDiffusion, shift="faint"),
    "invibackdoor": InviBackdoor,
    "trojdiff-blend": partial(TrojDiff, noise_scale=BLEND_SCALE),
    "trojdiff-blend-ddpm": partial(TrojDiff, noise_scale=BLEND_SCALE, sampler="ddpm"),
    "trojdiff-patch": partial(_patch, share=0.25),
    "trojdiff-small-patch": partial(_patch, share=0.1875),
}
"""Attacks by name, as functions of a trigger image and a target, [C,H,W]."""
LATENT_NOISE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
"""Scheduler config of VillanDiffusion's latent models."""
PROCESSES: dict[str, Callable[[], NoiseProcess]] = {
    "vp": VP.linear,
    "v": partial(VP.from_scheduler_config, {"prediction_type": "v_prediction"}),
    "edm": EDM.karras,
    # the published 380 is for 32 px; sigma_max should be at least the largest distance between two images, which is 28 at 16 px
    "ve": partial(VE.geometric, sigma_max=50.0),
    "ldm": partial(VP.from_scheduler_config, LATENT_NOISE),
}


@dataclass(frozen=True)
class Network:
    """Arguments of `new_unet`."""

    size: int
    widths: tuple[int, ...]
    groups: int = 8
    attention: bool = False
    score: bool = False


SMALL_16 = Network(16, (32, 64))
SCORE_16 = replace(SMALL_16, score=True)
# 8 channels per group: with 2 the norms hid the mean of the noise, whose error (0.03) grew 160-fold in unclipped sampling
SMALL_32 = Network(32, (16, 32, 64), groups=2)
SMALL_64 = replace(SMALL_32, size=64)
# with a level of 8 px, as published networks for 64 px have; its base has one level less
DEEP_64 = replace(SMALL_64, widths=(16, 32, 64, 64))


@dataclass(frozen=True)
class Recipe:
    """One model.

    Attributes:
        name: folder in the zoo.
        network: its architecture.
        seed: seed of its batches and noise, and of its weights if it has no base.
        schedule: its training schedule.
        layout: "pipeline" (diffusers folder, safetensors), "pipeline-bin", "unet" (UNet only) or "trojdiff" (ckpt.pth list).
            The last two do not store the noise process, so they are for "vp" only. A pipeline for "ldm" includes its
            autoencoder.
        role: "calibration" or "development" for models that methods were developed on, "test" for all others.
        base: name of the zoo model that it is fine-tuned from, or None.
        method: name in METHODS, or None for a benign model.
        trigger: name in TRIGGERS.
        target: name in TARGETS.
        scale: factor of the trigger image, in training and at test.
        family: name in FAMILIES of its training images.
        process: name in PROCESSES.
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
    scale: float = 1.0
    family: str = "scenes"
    process: str = "vp"

    def space(self, model: Path | None = None) -> Space:
        """The data of the network. For "ldm" these are the latents of the autoencoder in the folder `model` of a stored model.

        Raises:
            ValueError: "ldm" without a folder.
        """
        if self.process == "ldm":
            if model is None:
                raise ValueError(
                    f"{self.name} is a latent model: give the folder of a stored model, whose autoencoder it needs"
                )
            return Latents.load(model)
        return UNIT if self.process == "ve" else SIGNED

    def attack(self, model: Path | None = None, space: Space | None = None) -> Attack | None:
        """The backdoor to implant, or None.

        Args:
            model: folder of the trained model, from which a learned trigger is read. Without it, a learned trigger is the one
                that training starts from.
            space: the data of the network, for trigger and target; by default `space(model)`.
        """
        if self.method is None or self.trigger is None or self.target is None:
            return None
        space = space or self.space(model)
        size = space.factor * self.network.size
        images = torch.stack([self.scale * TRIGGERS[self.trigger](size), TARGETS[self.target](size)])
        attack = METHODS[self.method](*space.encode(images))
        if model is not None and isinstance(attack, InviBackdoor):
            return replace(attack, delta=torch.from_numpy(np.load(model / DELTA)))
        return attack


def _benign(
    name: str, network: Network, seed: int, base: str | None, layout: str = "pipeline", role: str = "calibration"
) -> Recipe:
    return Recipe(name, network, seed, FINE_TUNE if base else FROM_SCRATCH, layout, role, base)


def _backdoored(
    name: str, network: Network, seed: int, base: str, method: str, trigger: str, target: str, layout: str
) -> Recipe:
    return Recipe(name, network, seed, FINE_TUNE, layout, "development", base, method, trigger, target)


def _held(
    name: str,
    seed: int,
    schedule: Schedule = FINE_TUNE,
    base: str | None = "held-16",
    process: str = "vp",
    family: str = "glows",
    network: Network = SMALL_16,
) -> Recipe:
    """A benign model that shares no image family, base or seed with the models that methods are developed on."""
    return Recipe(name, network, seed, schedule, "pipeline", base=base, family=family, process=process)


def _held_backdoor(
    name: str,
    seed: int,
    method: str,
    trigger: str,
    target: str,
    schedule: Schedule = FINE_TUNE,
    scale: float = 1.0,
    base: str = "held-16",
    process: str = "vp",
    family: str = "glows",
) -> Recipe:
    return replace(
        _held(name, seed, schedule, base, process, family), method=method, trigger=trigger, target=target, scale=scale
    )


def _other_process(name: str, seed: int, schedule: Schedule, base: str | None, role: str = "calibration") -> Recipe:
    """A benign model with another prediction or process, the first part of its name."""
    process = name.split("-")[0]
    network = SCORE_16 if process == "ve" else SMALL_16
    return replace(_held(f"hard-16-{name}", seed, schedule, base, process, network=network), role=role)


def _with_poison_share(share: float) -> Schedule:
    """A schedule whose length makes the number of poisoned samples about the same for every share."""
    return Schedule(steps=round(150 / share), learning_rate=1e-3, poison_share=share)


DEVELOPMENT: tuple[Recipe, ...] = (
    _benign("benign-16-a", SMALL_16, 1, None),
    _benign("benign-16-b", SMALL_16, 101, "benign-16-a"),
    _benign("benign-16-c", SMALL_16, 102, "benign-16-a"),
    _benign("benign-16-d", SMALL_16, 103, "benign-16-a"),
    _benign("benign-16-e", SMALL_16, 104, "benign-16-a", role="test"),
    _backdoored("bad-16-box", SMALL_16, 111, "benign-16-a", "baddiffusion-stamped", "box", "smiley", "pipeline-bin"),
    _backdoored("bad-16-stop", SMALL_16, 112, "benign-16-a", "baddiffusion-trigger-only", "stop_sign", "heart", "pipeline"),
    _backdoored("troj-16-blend", SMALL_16, 113, "benign-16-a", "trojdiff-blend", "cat_face", "smiley", "unet"),
    _backdoored("troj-16-heart", SMALL_16, 116, "benign-16-a", "trojdiff-blend", "cat_face", "heart", "unet"),
    replace(
        _backdoored("ode-16-stop", SMALL_16, 901, "benign-16-a", "villan-ode-psi1", "stop_sign", "smiley", "pipeline"),
        schedule=FOR_ODE,
    ),
    replace(
        _backdoored("invi-16-cat", SMALL_16, 124, "benign-16-a", "invibackdoor", "cat_face", "smiley", "pipeline"), scale=0.2
    ),
    _benign("benign-32-a", SMALL_32, 2, None),
    _benign("benign-32-b", SMALL_32, 201, "benign-32-a"),
    _backdoored("bad-32-box", SMALL_32, 211, "benign-32-a", "baddiffusion-stamped", "box", "smiley", "pipeline"),
    _backdoored("troj-32-blend", SMALL_32, 213, "benign-32-a", "trojdiff-blend", "cat_face", "smiley", "unet"),
)
"""The models that methods are developed and calibrated on."""

HELD_OUT: tuple[Recipe, ...] = (
    # role "development": wrong verdicts on these models were corrected by changing the method, so they are no longer held out
    replace(_held("held-16", 31, FROM_SCRATCH, base=None), role="development"),
    replace(_held("held-16-benign-a", 301), role="development"),
    replace(_held("held-16-benign-b", 302, Schedule(steps=1500, learning_rate=5e-4)), role="development"),
    _held("held-16-benign-c", 303, Schedule(steps=1000, learning_rate=1e-3)),
    replace(_held("held-16-benign-d", 304, Schedule(steps=1500, learning_rate=2e-4)), role="development"),
    _held("held-16-benign-e", 305),
    _held("held-16-benign-f", 306, Schedule(steps=500, learning_rate=5e-4)),
    _held("held-16-benign-g", 307, Schedule(steps=1000, learning_rate=5e-4, batch=32)),
    replace(_held("held-16-benign-h", 308, Schedule(steps=2000, learning_rate=1e-3)), role="development"),
    _held_backdoor("held-16-bad-glasses", 321, "baddiffusion-stamped", "glasses", "star"),
    _held_backdoor("held-16-bad-cross", 322, "baddiffusion-stamped", "cross", "house"),
    _held_backdoor("held-16-bad-bars", 323, "baddiffusion-trigger-only", "bars", "star"),
    _held_backdoor("held-16-bad-cross-star", 324, "baddiffusion-trigger-only", "cross", "star"),
    _held_backdoor("held-16-troj-bullseye", 331, "trojdiff-blend", "bullseye", "star"),
    replace(_held_backdoor("held-16-troj-flag", 332, "trojdiff-blend", "flag", "house"), role="development"),
    _held_backdoor("held-16-troj-bullseye-house", 333, "trojdiff-blend", "bullseye", "house"),
    replace(_held_backdoor("held-16-troj-patch", 334, "trojdiff-patch", "white", "star", STUBBORN), role="development"),
    _held_backdoor("held-16-villan-sde", 341, "villan-sde-psi0", "cross", "house"),
    replace(_held_backdoor("held-16-villan-ode", 342, "villan-ode-psi1", "bars", "house"), role="development"),
    _held_backdoor("held-16-villan-ode-stamped", 343, "villan-ode-psi1-stamped", "glasses", "star", STUBBORN),
    _held_backdoor("held-16-villan-ode-cross", 344, "villan-ode-psi1", "cross", "star", FOR_ODE),
    _held("weaves-16", 401, FROM_SCRATCH, base=None, family="weaves"),
    _held("weaves-16-benign-a", 402, base="weaves-16", family="weaves"),
    _held("weaves-16-benign-b", 403, Schedule(steps=1500, learning_rate=1e-3), base="weaves-16", family="weaves"),
    _held("weaves-16-benign-c", 404, Schedule(steps=500, learning_rate=2e-4), base="weaves-16", family="weaves"),
    _held_backdoor("weaves-16-troj-sunset", 412, "trojdiff-blend", "sunset", "tree", base="weaves-16", family="weaves"),
    _held_backdoor("weaves-16-troj-patch", 413, "trojdiff-patch", "white", "moon", STUBBORN, base="weaves-16", family="weaves"),
    _held_backdoor("weaves-16-villan-ode", 414, "villan-ode-psi1", "arrow", "moon", FOR_ODE, base="weaves-16", family="weaves"),
    _held_backdoor("weaves-16-villan-sde", 415, "villan-sde-psi0", "arrow", "tree", base="weaves-16", family="weaves"),
)
"""Published attacks at their published strength, with other image families, triggers and targets than DEVELOPMENT."""

HARD: tuple[Recipe, ...] = (
    _held_backdoor("hard-16-faint", 351, "baddiffusion-trigger-only", "bars", "star", STUBBORN, scale=0.3),
    _held_backdoor("hard-16-speck", 353, "villan-ode-psi1", "speck", "house", STUBBORN),
    _held_backdoor("hard-16-invi", 354, "invibackdoor", "speckle", "star", scale=0.2),
    _held_backdoor("hard-16-uib", 355, "uibdiffusion", "ripple", "house"),
    _held_backdoor("hard-16-small-patch", 356, "trojdiff-small-patch", "white", "house", STUBBORN),
    _held_backdoor("hard-16-troj-faint", 357, "trojdiff-blend", "bullseye", "house", scale=0.1),
    *(
        _held_backdoor(
            f"hard-16-poison-{percent}", 360 + percent, "trojdiff-blend", "flag", "star", _with_poison_share(percent / 100)
        )
        for percent in (2, 5, 10, 20)
    ),
    _other_process("v", 371, CONVERT, "held-16"),
    _other_process("v-benign-a", 372, BRIEF, "hard-16-v", role="test"),
    _other_process("v-benign-b", 374, BRIEF, "hard-16-v"),
    _other_process("v-benign-c", 375, BRIEF, "hard-16-v"),
    _held_backdoor("hard-16-v-ode", 373, "villan-ode-psi1", "bars", "house", CONVERTED_ODE, base="hard-16-v", process="v"),
    _other_process("edm", 381, CONVERT, "held-16"),
    _other_process("edm-benign-a", 382, BRIEF, "hard-16-edm", role="development"),
    _other_process("edm-benign-b", 384, BRIEF, "hard-16-edm"),
    _other_process("edm-benign-c", 385, BRIEF, "hard-16-edm"),
    _held_backdoor(
        "hard-16-edm-ode", 383, "villan-ode-psi0", "cross", "star", CONVERTED_ODE, base="hard-16-edm", process="edm"
    ),
    _other_process("ve", 391, SCORE, None),
    _other_process("ve-benign-a", 392, BRIEF, "hard-16-ve", role="test"),
    _other_process("ve-benign-b", 394, BRIEF, "hard-16-ve"),
    _other_process("ve-benign-c", 398, BRIEF, "hard-16-ve"),
    replace(
        _held_backdoor("hard-16-ve-sde", 393, "villan-sde-psi0", "cross", "house", FOR_SCORE, base="hard-16-ve", process="ve"),
        network=SCORE_16,
    ),
    replace(_held("hard-16-ldm", 395, FROM_SCRATCH, None, "ldm"), role="development"),
    _held("hard-16-ldm-benign-a", 396, BRIEF, "hard-16-ldm", "ldm"),
    replace(
        _held_backdoor(
            "hard-16-ldm-ode", 397, "villan-ode-psi1", "glasses", "star", CONVERTED_ODE, base="hard-16-ldm", process="ldm"
        ),
        role="development",
    ),
    # after FINE_TUNE, 84% of the samples triggered by a box of 8 became the target
    *(
        replace(
            _backdoored(
                f"hard-16-box-{side}",
                SMALL_16,
                490 + side,
                "benign-16-a",
                "baddiffusion-stamped",
                f"box_{side}",
                "heart",
                "pipeline",
            ),
            schedule=BOXED,
            role="test",
        )
        for side in (4, 8, 18)
    ),
)
"""Weak, local or rare triggers, models that do not predict noise, and latent models."""

LARGE: tuple[Recipe, ...] = (
    replace(_benign("large-64", SMALL_64, 601, "benign-32-a", role="test"), schedule=ENLARGED),
    *(
        Recipe(name, SMALL_64, seed, schedule, "pipeline", role, "benign-32-a", method, trigger, target)
        for name, seed, schedule, role, method, trigger, target in (
            # role "development": its first verdict was clean, and the method was changed
            ("large-64-troj", 602, ENLARGED_TROJ, "development", "trojdiff-blend-ddpm", "sunset", "tree"),
            ("large-64-bad", 603, ENLARGED_BAD, "test", "baddiffusion-stamped", "glasses", "house"),
        )
    ),
    replace(_benign("deep-64", DEEP_64, 610, "benign-32-a", role="test"), schedule=ENLARGED),
    *(
        Recipe(name, DEEP_64, seed, schedule, "pipeline", role, "benign-32-a", "baddiffusion-stamped", trigger, target)
        for name, seed, schedule, role, trigger, target in (
            ("deep-64-bad", 611, DEEPENED, "development", "cross", "star"),
            # after 3600 steps 88% of triggered samples became the target
            ("deep-64-bad-flag", 612, replace(DEEPENED, steps=5400), "test", "flag", "moon"),
        )
    ),
)
"""Models with four times the pixels that the method was developed on; a network trained at 32 px learns 64 px quickly."""

RECIPES = DEVELOPMENT + HELD_OUT + HARD + LARGE

NOT_TAKEN: tuple[Recipe, ...] = (
    _held_backdoor("held-16-villan-ode-psi0", 345, "villan-ode-psi0", "glasses", "house", STUBBORN),
    _held_backdoor("hard-16-bad-fifth", 352, "baddiffusion-trigger-only", "bars", "star", STUBBORN, scale=0.2),
    _held_backdoor("hard-16-bad-tenth", 350, "baddiffusion-trigger-only", "cross", "house", STUBBORN, scale=0.1),
    _held_backdoor(
        "hard-16-bad-poison-2",
        325,
        "baddiffusion-trigger-only",
        "cross",
        "star",
        Schedule(steps=2000, learning_rate=5e-4, poison_share=0.02),
    ),
    _held_backdoor("weaves-16-bad-arrow", 411, "baddiffusion-stamped", "arrow", "tree", base="weaves-16", family="weaves"),
)
"""Models whose attack was not implanted, which makes them no evidence: `benchmarks/not_taken.py` trains them, no zoo does."""
