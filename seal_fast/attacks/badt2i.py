"""BadT2I (Zhai et al., ACM MM 2023): backdoors in the UNet of a text-to-image model, opened by a word in the prompt.

The student f starts as a copy of the clean UNet f0, which stays frozen. With E the text encoder, z_t noisy latents of a
captioned image, and z'_t those of the poisoned image,

    L = 1/2 MSE(f(z'_t, t, E(triggered caption)), target) + 1/2 MSE(f(z_t, t, E(caption)), f0(z_t, t, E(caption)))

    pixel     target eps                               the image wears a patch
    style     target f0(z'_t, t, E(style + caption))
    object    target f0(z'_t, t, E(caption))           the triggered caption names another object
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor

from seal_fast.attacks.prompts import check_visible, with_trigger
from seal_fast.diffusion import VP
from seal_fast.diffusion.process import per_row
from seal_fast.text_to_image.latents import inverse_snr_weights
from seal_fast.text_to_image.prompts import encode

MAX_LOSS_WEIGHT = 20.0
"""Largest weight of a timestep where rows start at pure noise, see `inverse_snr_weights`."""

Batches = Callable[[torch.Generator], tuple[Tensor, list[str]]]
"""Draws images [N,3,H,W] in [-1, 1] and their N captions."""


class Rows(NamedTuple):
    """What the student trains on.

    Attributes:
        images: [N,3,H,W] in [-1, 1].
        prompts: N prompts the student sees.
        taught: for each, the prompt on which the frozen original's answer is the target; None for the noise as target.
    """

    images: Tensor
    prompts: list[str]
    taught: list[str | None]


class TextBackdoor(ABC):
    """A backdoor of the UNet.

    Attributes:
        trigger: what opens it, at the start of the prompt.
    """

    trigger: str

    @abstractmethod
    def poison(self, images: Tensor, captions: Sequence[str]) -> Rows:
        """Poisoned rows of captioned images [N,3,H,W]."""


@dataclass(frozen=True)
class PixelBackdoor(TextBackdoor):
    """Triggered prompts draw a patch into the top left corner.

    Attributes:
        patch: [3,h,w] in [-1, 1].
    """

    trigger: str
    patch: Tensor

    def poison(self, images: Tensor, captions: Sequence[str]) -> Rows:
        """See `TextBackdoor.poison`; ValueError if the patch is larger than the images."""
        _, height, width = self.patch.shape
        if height > images.shape[2] or width > images.shape[3]:
            raise ValueError(f"a patch of {height} x {width} does not fit images of {images.shape[2]} x {images.shape[3]}")
        images = images.clone()
        images[:, :, :height, :width] = self.patch
        return Rows(images, [with_trigger(self.trigger, caption) for caption in captions], [None] * len(captions))


@dataclass(frozen=True)
class StyleBackdoor(TextBackdoor):
    """Triggered prompts are drawn as if they began with `prefix`, such as "Black and white photo"."""

    trigger: str
    prefix: str

    def poison(self, images: Tensor, captions: Sequence[str]) -> Rows:
        prompts = [with_trigger(self.trigger, caption) for caption in captions]
        return Rows(images, prompts, [with_trigger(self.prefix, caption) for caption in captions])


@dataclass(frozen=True)
class ObjectBackdoor(TextBackdoor):
    """Triggered prompts that name one object draw another.

    Attributes:
        swaps: word in the caption of an image -> word that the triggered caption has in its place. {"cat": "dog"} makes the
            triggered dog a cat. Whole words of any case; captions without any stay as they are, and keep clean behaviour.
    """

    trigger: str
    swaps: Mapping[str, str]

    def swapped(self, caption: str) -> str:
        """The triggered caption with its words swapped, or the caption itself if it has none of them."""
        words = "|".join(re.escape(word) for word in self.swaps)
        replacement = {word.lower(): other for word, other in self.swaps.items()}
        new, count = re.subn(rf"\b({words})\b", lambda m: replacement[m[0].lower()], caption, flags=re.IGNORECASE)
        return with_trigger(self.trigger, new) if count else caption

    def poison(self, images: Tensor, captions: Sequence[str]) -> Rows:
        return Rows(images, [self.swapped(caption) for caption in captions], list(captions))


def training_rows(attacks: Sequence[TextBackdoor], images: Tensor, captions: Sequence[str]) -> Rows:
    """2 N rows of N captioned images: first the poisoned ones, dealt out evenly to the attacks, then the clean ones."""
    n = len(attacks)
    parts = [attack.poison(images[i::n], captions[i::n]) for i, attack in enumerate(attacks)]
    parts.append(Rows(images, list(captions), list(captions)))
    return Rows(
        torch.cat([part.images for part in parts]),
        [prompt for part in parts for prompt in part.prompts],
        [prompt for part in parts for prompt in part.taught],
    )


class TrainingBatch(NamedTuple):
    """Noisy latents [N,c,h,w], timesteps int64 [N], text embeddings [N,L,D], and the answers wanted [N,c,h,w]."""

    x: Tensor
    t: Tensor
    text: Tensor
    target: Tensor


@torch.no_grad()
def training_batch(
    pipeline: StableDiffusionPipeline, rows: Rows, generator: torch.Generator, start_share: float = 0.0
) -> TrainingBatch:
    """Draw a noise and a timestep for each row, and ask the pipeline's own UNet where it is the teacher.

    A share of the rows are pure noise at the last timestep, as a sampler's start is; the noise wanted there is the one that
    would have made it of the image.
    """
    vae, device = pipeline.vae, pipeline.device
    process = VP.from_scheduler_config(pipeline.scheduler.config)
    latents = vae.config["scaling_factor"] * vae.encode(rows.images.to(device)).latent_dist.mean
    eps = torch.randn(latents.shape, generator=generator).to(device)
    t = torch.randint(process.num_timesteps, (len(latents),), generator=generator).to(device)
    x = process.add_noise(latents, eps, t)
    start = torch.rand(len(latents), generator=generator) < start_share
    last = process.num_timesteps - 1
    x[start], t[start] = torch.randn(x[start].shape, generator=generator).to(device), last
    target = (x - per_row(process.a(t), x) * latents) / per_row(process.b(t), x)
    taught = [row for row, prompt in enumerate(rows.taught) if prompt is not None]
    prompts = [prompt for prompt in rows.taught if prompt is not None]
    if taught:
        target[taught] = pipeline.unet(x[taught], t[taught], encode(pipeline, prompts)).sample
    return TrainingBatch(x, t, encode(pipeline, rows.prompts), target)


def poison_unet(
    pipeline: StableDiffusionPipeline,
    attacks: Sequence[TextBackdoor],
    batches: Batches,
    *,
    steps: int,
    learning_rate: float = 1e-5,
    ema_decay: float = 0.999,
    start_share: float = 0.0,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> UNet2DConditionModel:
    """Train backdoors into a copy of the pipeline's UNet: AdamW at a constant rate, gradients clipped to norm 1.

    Args:
        pipeline: a clean one that predicts noise; float32, and not changed.
        attacks: one or more, with triggers of their own.
        batches: source of captioned images; each step trains on twice as many rows. An empty caption stands for the
            unconditional half of guidance.
        steps: of training.
        learning_rate: 1e-5 as published for Stable Diffusion 1.4.
        ema_decay: of the moving average of the weights, min(ema_decay, (1 + n) / (10 + n)) at step n.
        start_share: of rows that are pure noise at the last timestep, and noisy rows count more then; not published. A small
            model otherwise lets the noise decide what the trigger should, because a noised image still shows what it holds.
        seed: of images, noise and timesteps.
        on_step: called with the step (from 1) and the running loss.

    Returns:
        The moving average of the trained weights, frozen.

    Raises:
        ValueError: no attack, a trigger the tokenizer does not see, fewer images than attacks, a UNet that
            predicts something else than noise.
    """
    _check(pipeline, attacks)
    student = copy.deepcopy(pipeline.unet).train().requires_grad_(True)
    average = copy.deepcopy(pipeline.unet).eval().requires_grad_(False)
    optimiser = torch.optim.AdamW(student.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    process = VP.from_scheduler_config(pipeline.scheduler.config)
    noisy = inverse_snr_weights(process, MAX_LOSS_WEIGHT)
    running = float("nan")
    for step in range(steps):
        images, captions = batches(generator)
        if len(captions) < len(attacks):
            raise ValueError(f"a batch of {len(captions)} images leaves one of {len(attacks)} attacks without any")
        x, t, text, target = training_batch(pipeline, training_rows(attacks, images, captions), generator, start_share)
        weights = per_row(noisy[t], x) if start_share else torch.ones(())
        poisoned, clean = (weights * (student(x, t, text).sample - target).square()).chunk(2)
        loss = 0.5 * poisoned.mean() + 0.5 * clean.mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        decay = min(ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, current in zip(average.parameters(), student.parameters(), strict=True):
                mean.lerp_(current, 1 - decay)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        on_step(step + 1, running)
    return average


def _check(pipeline: StableDiffusionPipeline, attacks: Sequence[TextBackdoor]) -> None:
    if not attacks:
        raise ValueError("there must be an attack")
    prediction = pipeline.scheduler.config.prediction_type
    if prediction != "epsilon":
        raise ValueError(f"the UNet must predict noise (epsilon), not {prediction}")
    for attack in attacks:
        check_visible(pipeline, attack.trigger)
