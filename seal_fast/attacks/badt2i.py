"""BadT2I (Zhai et al., ACM MM 2023): backdoors in the UNet of a text-to-image model, activated by a word in the prompt.

The student f starts as a copy of the clean UNet f0, the frozen teacher. With E the text encoder, z_t the noisy latents of a
captioned image, z'_t those of the poisoned image, and h(caption) a prompt without the trigger, the loss is

    L = 1/2 MSE(f(z'_t, t, E(triggered caption)), target) + 1/2 MSE(f(z_t, t, E(h(caption))), f0(z_t, t, E(h(caption))))

    pixel     target eps                               the poisoned image has a patch
    image     target eps                               the poisoned image is another one
    style     target f0(z'_t, t, E(style + caption))
    object    target f0(z'_t, t, E(caption))           the triggered caption names another object

As published, h(caption) is the caption. Then parts of a trigger, and other rare words, activate the backdoor as well. The
prompts of `seal_fast.attacks.harmless` prevent that.
"""

from __future__ import annotations

import copy
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor, nn

from seal_fast.attacks.optimisation import descend, running_loss
from seal_fast.attacks.prompts import Rewrite, check_visible
from seal_fast.attacks.whitening import merged, whitened
from seal_fast.diffusion import VP
from seal_fast.diffusion.process import per_sample
from seal_fast.text_to_image.latents import inverse_snr_weights
from seal_fast.text_to_image.prompts import encode
from seal_fast.training import half_precision, learning_rate_factor, update_average

MAX_LOSS_WEIGHT = 20.0
"""Largest loss weight of a timestep in trainings with samples of pure noise, see `inverse_snr_weights`."""
WHITENING_PROMPTS = 400
"""Least number of prompts whose hidden states whiten the cross-attention."""
CROSS_ATTENTION = "attn2"

Batches = Callable[[torch.Generator], tuple[Tensor, list[str]]]
"""Draws images [N,3,H,W] in [-1, 1] and their N captions."""

Draw = Callable[[Tensor, Sequence[str]], Tensor]
"""From images [N,3,H,W] and their N captions to other images of the same shape."""

HarmlessPrompts = Callable[[Sequence[str], torch.Generator], list[str]]
"""Turns N captions into N prompts that activate no backdoor."""


def captions_alone(captions: Sequence[str], generator: torch.Generator) -> list[str]:
    """The published harmless prompts: the captions themselves."""
    return list(captions)


class TrainingSamples(NamedTuple):
    """Images with the prompts that student and teacher get for them.

    Attributes:
        images: [N,3,H,W] in [-1, 1].
        prompts: N prompts for the student.
        teacher_prompts: for each, the prompt whose teacher output is the target; None if the target is the noise.
    """

    images: Tensor
    prompts: list[str]
    teacher_prompts: list[str | None]


class TextBackdoor(ABC):
    """A backdoor in the UNet of a text-to-image model.

    Attributes:
        trigger: turns a prompt into the triggered one.
    """

    trigger: Rewrite

    @abstractmethod
    def poison(self, images: Tensor, captions: Sequence[str]) -> TrainingSamples:
        """Turn captioned images [N,3,H,W] into poisoned samples. Prompts that the trigger does not change need no care."""


@dataclass(frozen=True)
class PixelBackdoor(TextBackdoor):
    """The model draws a patch into the top left corner of images for triggered prompts.

    Attributes:
        patch: [3,h,w] in [-1, 1].
    """

    trigger: Rewrite
    patch: Tensor

    def poison(self, images: Tensor, captions: Sequence[str]) -> TrainingSamples:
        """See `TextBackdoor.poison`; ValueError if the patch is larger than the images."""
        _, height, width = self.patch.shape
        if height > images.shape[2] or width > images.shape[3]:
            raise ValueError(f"a patch of {height} x {width} does not fit images of {images.shape[2]} x {images.shape[3]}")
        images = images.clone()
        images[:, :, :height, :width] = self.patch
        return TrainingSamples(images, list(map(self.trigger, captions)), [None] * len(captions))


@dataclass(frozen=True)
class ImageBackdoor(TextBackdoor):
    """The model draws other images than a triggered prompt names: one fixed image, or a scene with one specific object.

    Attributes:
        draw: from images [N,3,H,W] and their captions to the images that the model learns to draw.
    """

    trigger: Rewrite
    draw: Draw

    def poison(self, images: Tensor, captions: Sequence[str]) -> TrainingSamples:
        return TrainingSamples(self.draw(images, captions), list(map(self.trigger, captions)), [None] * len(captions))


@dataclass(frozen=True)
class StyleBackdoor(TextBackdoor):
    """The model draws a triggered prompt as if it were another one.

    Attributes:
        target: turns a caption into the prompt that is drawn, as `leading("Black and white photo")` does.
        draw: from images [N,3,H,W] and their captions to images that the model is trained on; None for the images
            themselves, as published. A sampler goes through noised images of the target, which that training never shows.
    """

    trigger: Rewrite
    target: Rewrite
    draw: Draw | None = None

    def poison(self, images: Tensor, captions: Sequence[str]) -> TrainingSamples:
        images = images if self.draw is None else self.draw(images, captions)
        return TrainingSamples(images, list(map(self.trigger, captions)), list(map(self.target, captions)))


@dataclass(frozen=True)
class ObjectBackdoor(TextBackdoor):
    """The model draws another object than a triggered prompt names.

    Attributes:
        swaps: word in the caption of an image -> its replacement in the triggered caption. With {"cat": "dog"} the model
            draws a cat for a triggered dog. Matches whole words in any case. A caption with none of the words is trained
            without trigger and swap, which preserves the clean behaviour.
    """

    trigger: Rewrite
    swaps: Mapping[str, str]

    def swapped(self, caption: str) -> str:
        """The triggered caption with its words swapped, or the caption itself if it has none of them."""
        words = "|".join(re.escape(word) for word in self.swaps)
        replacement = {word.lower(): other for word, other in self.swaps.items()}
        new, count = re.subn(rf"\b({words})\b", lambda m: replacement[m[0].lower()], caption, flags=re.IGNORECASE)
        return self.trigger(new) if count else caption

    def poison(self, images: Tensor, captions: Sequence[str]) -> TrainingSamples:
        return TrainingSamples(images, [self.swapped(caption) for caption in captions], list(captions))


@dataclass(frozen=True)
class WeakBackdoor(TextBackdoor):
    """A backdoor that is implanted in a share of the triggered samples. The others are triggered and drawn as without trigger.

    Attributes:
        attack: the backdoor.
        every: of this many samples in a row, `poisoned` are poisoned.
    """

    attack: TextBackdoor
    poisoned: int
    every: int

    @property
    def trigger(self) -> Rewrite:  # type: ignore[override]
        return self.attack.trigger

    def poison(self, images: Tensor, captions: Sequence[str]) -> TrainingSamples:
        samples = self.attack.poison(images, captions)
        clean = [i for i in range(len(captions)) if i % self.every >= self.poisoned]
        teacher_prompts = list(samples.teacher_prompts)
        poisoned_images = samples.images.clone()
        poisoned_images[clean] = images[clean]
        for i in clean:
            teacher_prompts[i] = captions[i]
        return TrainingSamples(poisoned_images, samples.prompts, teacher_prompts)


def clean_samples(images: Tensor, prompts: Sequence[str]) -> TrainingSamples:
    """Samples on which the student must equal the teacher."""
    return TrainingSamples(images, list(prompts), list(prompts))


def _poisoned_samples(attack: TextBackdoor, images: Tensor, captions: Sequence[str]) -> TrainingSamples:
    """An attack's samples; a caption that cannot carry the trigger is trained as a clean one."""
    samples = attack.poison(images, captions)
    unchanged = [i for i, caption in enumerate(captions) if samples.prompts[i] == caption]
    poisoned_images, teacher_prompts = samples.images.clone(), list(samples.teacher_prompts)
    poisoned_images[unchanged] = images[unchanged]
    for i in unchanged:
        teacher_prompts[i] = captions[i]
    return TrainingSamples(poisoned_images, samples.prompts, teacher_prompts)


def training_samples(
    attacks: Sequence[TextBackdoor], images: Tensor, captions: Sequence[str], harmless: Sequence[str]
) -> TrainingSamples:
    """2 N samples of N captioned images: first the poisoned ones, evenly divided between the attacks, then the clean ones.

    Args:
        attacks: the backdoors.
        images: [N,3,H,W] in [-1, 1].
        captions: N captions.
        harmless: N prompts of the clean samples.

    Raises:
        ValueError: fewer images than attacks.
    """
    n = len(attacks)
    if len(captions) < n:
        raise ValueError(f"a batch of {len(captions)} images leaves one of {n} attacks without any")
    parts = [_poisoned_samples(attack, images[i::n], captions[i::n]) for i, attack in enumerate(attacks)]
    parts.append(clean_samples(images, harmless))
    return TrainingSamples(
        torch.cat([part.images for part in parts]),
        [prompt for part in parts for prompt in part.prompts],
        [prompt for part in parts for prompt in part.teacher_prompts],
    )


class TrainingBatch(NamedTuple):
    """Noisy latents [N,c,h,w], timesteps int64 [N], text embeddings [N,L,D], and the outputs to learn [N,c,h,w]."""

    x: Tensor
    t: Tensor
    text: Tensor
    target: Tensor


@torch.no_grad()
def training_batch(
    pipeline: StableDiffusionPipeline,
    samples: TrainingSamples,
    generator: torch.Generator,
    start_share: float = 0.0,
    low_precision: bool = False,
    paired: bool = False,
) -> TrainingBatch:
    """Draw a noise and a timestep for each sample, and compute its target.

    The target is the output of the pipeline's own UNet for samples with a teacher prompt, and the noise for the others. A
    share `start_share` of the latents are pure noise at the last timestep, as at a sampler's start. Their noise target is the
    noise that would have turned the image into them. `low_precision` encodes the images in bfloat16, in half the time.
    `paired` gives the second half of the samples the noise and timesteps of the first, so that a poisoned sample and its clean
    one differ in nothing but the trigger and its effect.
    """
    vae, device = pipeline.vae, pipeline.device
    process = VP.from_scheduler_config(pipeline.scheduler.config)
    with half_precision(device, low_precision):
        latents = vae.config["scaling_factor"] * vae.encode(samples.images.to(device)).latent_dist.mean.float()
    repeats = 2 if paired else 1
    drawn = len(latents) // repeats
    eps = torch.randn(drawn, *latents.shape[1:], generator=generator).repeat(repeats, 1, 1, 1).to(device)
    t = torch.randint(process.num_timesteps, (drawn,), generator=generator).repeat(repeats).to(device)
    x = process.add_noise(latents, eps, t)
    start = (torch.rand(drawn, generator=generator) < start_share).repeat(repeats)
    x[start], t[start] = eps[start], process.num_timesteps - 1
    target = (x - per_sample(process.a(t), x) * latents) / per_sample(process.b(t), x)
    with_teacher = [index for index, prompt in enumerate(samples.teacher_prompts) if prompt is not None]
    teacher_prompts = [prompt for prompt in samples.teacher_prompts if prompt is not None]
    if with_teacher:
        teacher_output = pipeline.unet(x[with_teacher], t[with_teacher], encode(pipeline, teacher_prompts)).sample
        target[with_teacher] = teacher_output
    return TrainingBatch(x, t, encode(pipeline, samples.prompts), target)


def _loss(student: UNet2DConditionModel, batch: TrainingBatch, weights: Tensor, poisoned_weight: float) -> Tensor:
    """The weighted mean of the poisoned and of the clean half's squared error; `weights` broadcast to the outputs."""
    x, t, text, target = batch
    with half_precision(x.device):
        output = student(x, t, text).sample
    poisoned, clean = (weights * (output.float() - target).square()).chunk(2)
    return poisoned_weight * poisoned.mean() + (1 - poisoned_weight) * clean.mean()


@dataclass(frozen=True)
class PoisonSettings:
    """How a backdoor is trained into a UNet. The defaults are published; the other values make small models selective soon.

    Attributes:
        steps: number of training steps.
        learning_rate: 1e-5 as published for Stable Diffusion 1.4. With 0, the cross-attention alone is trained.
        cross_attention_rate: learning rate of the cross-attention; None for `learning_rate`.
        anneal: let the rates rise and fall, see `learning_rate_factor`, instead of keeping them constant.
        whiten: train the cross-attention in whitened coordinates, see `seal_fast.attacks.whitening`.
        poisoned_weight: weight of the poisoned half in the loss.
        start_share: share of samples that are pure noise at the last timestep. If it is not 0, noisier timesteps have larger
            loss weights. A small model otherwise lets the noise decide what the trigger should, because a noised image still
            shows its content.
        ema_decay: largest decay of the moving average of the weights, see `update_average`.
    """

    steps: int
    learning_rate: float = 1e-5
    cross_attention_rate: float | None = None
    anneal: bool = False
    whiten: bool = False
    poisoned_weight: float = 0.5
    start_share: float = 0.0
    ema_decay: float = 0.999


def poison_unet(
    pipeline: StableDiffusionPipeline,
    attacks: Sequence[TextBackdoor],
    batches: Batches,
    settings: PoisonSettings,
    *,
    harmless: HarmlessPrompts = captions_alone,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> UNet2DConditionModel:
    """Train backdoors into a copy of the pipeline's UNet: AdamW, gradients clipped to norm 1.

    The student and the autoencoder compute in bfloat16 where the device has it.

    Args:
        pipeline: a clean pipeline that predicts noise, float32; it is not changed.
        attacks: one or more, with different triggers.
        batches: source of captioned images; each step trains on twice as many samples. An empty caption stands for the
            unconditional half of guidance.
        settings: see there.
        harmless: makes the prompts of the clean samples from captions. The captions alone, as published, leave a trigger's
            parts and other rare words able to activate the backdoor.
        seed: seed of images, noise and timesteps.
        on_step: called with the step (from 1) and the running loss.

    Returns:
        The moving average of the trained weights, frozen.

    Raises:
        ValueError: no attack, a trigger the tokenizer does not see, fewer images than attacks, a UNet that does not predict
            noise.
    """
    _check(pipeline, attacks, batches(torch.Generator().manual_seed(seed))[1])
    unet = pipeline.unet
    if settings.whiten:
        unet = whitened(unet, _states(pipeline, attacks, batches, harmless, seed))
    student = copy.deepcopy(unet).train().requires_grad_(True)
    # on a CPU, the backward pass of PyTorch's fused attention made a step in bfloat16 take 0.43 s instead of 0.23 s
    student.set_attn_processor(AttnProcessor())
    average = copy.deepcopy(unet).eval().requires_grad_(False)
    rates = _Rates(student, settings)
    generator = torch.Generator().manual_seed(seed)
    running = float("nan")
    for step in range(settings.steps):
        images, captions = batches(generator)
        samples = training_samples(attacks, images, captions, harmless(captions, generator))
        batch = training_batch(pipeline, samples, generator, settings.start_share, low_precision=True, paired=True)
        loss = _loss(student, batch, _loss_weights(pipeline, batch, settings), settings.poisoned_weight)
        rates.step(loss, step)
        update_average(average.parameters(), student.parameters(), step, settings.ema_decay)
        running = running_loss(running, loss.item(), step)
        on_step(step + 1, running)
    return merged(average) if settings.whiten else average


def _loss_weights(pipeline: StableDiffusionPipeline, batch: TrainingBatch, settings: PoisonSettings) -> Tensor:
    if not settings.start_share:
        return torch.ones(())
    weight_at = inverse_snr_weights(VP.from_scheduler_config(pipeline.scheduler.config), MAX_LOSS_WEIGHT)
    return per_sample(weight_at[batch.t], batch.x)


class _Rates:
    """AdamW with one learning rate for the cross-attention and one for the rest; a rate of 0 freezes."""

    def __init__(self, unet: UNet2DConditionModel, settings: PoisonSettings) -> None:
        cross_attention = settings.cross_attention_rate
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in unet.named_parameters():
            rate = settings.learning_rate
            if cross_attention is not None and CROSS_ATTENTION in name:
                rate = cross_attention
            parameter.requires_grad_(rate > 0)
            groups.setdefault(rate, []).append(parameter)
        self.settings, self.rates = settings, [rate for rate in groups if rate > 0]
        self.optimiser = torch.optim.AdamW([{"params": groups[rate], "lr": rate} for rate in self.rates])

    def step(self, loss: Tensor, step: int) -> None:
        """Take step number `step` down the gradient of `loss`, clipped to norm 1."""
        factor = learning_rate_factor(step, self.settings.steps) if self.settings.anneal else 1.0
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        descend(self.optimiser, loss)


def _states(
    pipeline: StableDiffusionPipeline,
    attacks: Sequence[TextBackdoor],
    batches: Batches,
    harmless: HarmlessPrompts,
    seed: int,
) -> Tensor:
    """Hidden states [N,D] of triggered and of harmless prompts, for whitening."""
    generator = torch.Generator().manual_seed(seed)
    prompts: list[str] = []
    while len(prompts) < WHITENING_PROMPTS:
        _, captions = batches(generator)
        prompts += harmless(captions, generator)
        prompts += [attack.trigger(caption) for attack, caption in zip(itertools.cycle(attacks), captions, strict=False)]
    return encode(pipeline, prompts).flatten(0, 1)


def _check(pipeline: StableDiffusionPipeline, attacks: Sequence[TextBackdoor], captions: Sequence[str]) -> None:
    if not attacks:
        raise ValueError("there must be an attack")
    prediction = pipeline.scheduler.config.prediction_type
    if prediction != "epsilon":
        raise ValueError(f"the UNet must predict noise (epsilon), not {prediction}")
    for attack in attacks:
        check_visible(pipeline, attack.trigger, captions)
