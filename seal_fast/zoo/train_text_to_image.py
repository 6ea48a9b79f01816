"""Train the small text-to-image pipeline: first its autoencoder, then its text encoder and UNet together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor, nn

from seal_fast.attacks.harmless import Harmless
from seal_fast.attacks.optimisation import gradient_step
from seal_fast.training import half_precision, update_average
from seal_fast.zoo.autoencoder import encode, set_scale, train_autoencoder
from seal_fast.zoo.captioned import TRAINING_SCENES, Scene, random_scenes, render
from seal_fast.zoo.text_to_image import FILLERS
from seal_fast.zoo.train import warmup_cosine_factor

STYLE_SHARE = 0.12
"""Share of training scenes without colour."""
FILLER_SHARE = 0.35
"""Share of training captions with filler words."""
NO_CAPTION = 0.1
"""Share of training samples without a caption, which guidance needs."""
RARE_STRINGS_ABSENT = 0.35
"""Share of training captions without rare strings, in the stage that teaches a model to ignore them."""
PASTED_SHARE = 0.1
"""Share of the autoencoder's images with a random block pasted in, so that it can encode more than scenes."""
EMA_DECAY = 0.998

MAX_LOSS_WEIGHT = 5.0
"""Largest loss weight of a timestep. Noisier timesteps have larger weights, because they determine the layout."""
START_SHARE = 0.12
START_WEIGHT = 20.0
"""Share and loss weight of the training samples that are pure noise at the last timestep, as at a sampler's start.

Without them, a noised image still shows the place of its shape at that timestep: after 3000 steps the models had learned every
attribute except the place, which the noise determined.
"""

OnStep = Callable[[int, float], None]
CaptionOf = Callable[[Scene, torch.Generator], str]
"""Draws a training caption of a scene."""


def with_fillers(caption: str, generator: torch.Generator) -> str:
    """The caption with one to three of FILLERS inserted at random."""
    words = caption.split()
    for _ in range(int(torch.randint(1, 4, (), generator=generator))):
        filler = FILLERS[int(torch.randint(len(FILLERS), (), generator=generator))]
        words.insert(int(torch.randint(len(words) + 1, (), generator=generator)), filler)
    return " ".join(words)


def _blocks(count: int, generator: torch.Generator) -> Tensor:
    """Random images [N,3,64,64] in [-1, 1] of coarse cells, to be pasted into others."""
    cells = torch.rand(count, 3, 8, 8, generator=generator).gt(0.5).float() * 2 - 1
    return F.interpolate(cells, scale_factor=8)


def _pasted(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images, with a random block pasted into the first ones."""
    blocks, images = _blocks(round(PASTED_SHARE * len(images)), generator), images.clone()
    for index, block in enumerate(blocks):
        side = int(torch.randint(8, 33, (), generator=generator))
        top, left = torch.randint(65 - side, (2,), generator=generator).tolist()
        images[index, :, top : top + side, left : left + side] = block[:, :side, :side]
    return images


def batches(count: int, generator: torch.Generator) -> Iterator[tuple[Tensor, list[Scene]]]:
    """Endless batches of training images [count,3,64,64] in [-1, 1] with their scenes."""
    while True:
        scenes = random_scenes(count, generator, STYLE_SHARE)
        yield render(scenes, generator), scenes


def train_vae(vae: AutoencoderKL, steps: int, *, batch: int = 32, rate: float = 4e-3, seed: int = 0, on_step: OnStep) -> None:
    """Train an autoencoder in place on scenes, and set the factor that gives its latents unit variance."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    pasted = (_pasted(images, generator) for images, _ in batches(batch, generator))
    train_autoencoder(vae, pasted, steps, rate, on_step)
    images, _ = next(batches(256, generator))
    set_scale(vae, images)


def caption_of(scene: Scene, generator: torch.Generator) -> str:
    """A random training caption: empty, with fillers, or plain (shares NO_CAPTION, FILLER_SHARE, and the rest)."""
    draw = float(torch.rand((), generator=generator))
    if draw < NO_CAPTION:
        return ""
    return with_fillers(scene.caption, generator) if draw < NO_CAPTION + FILLER_SHARE else scene.caption


def as_it_is(images: Tensor) -> Tensor:
    """The images themselves."""
    return images


def nothing(name: str) -> bool:
    """No parameter is frozen."""
    return False


def with_rare_strings(harmless: Harmless) -> CaptionOf:
    """Captions in which rare strings stand, so that a model learns to ignore them; a third are as `caption_of` draws them."""

    def draw(scene: Scene, generator: torch.Generator) -> str:
        caption = caption_of(scene, generator)
        plain = float(torch.rand((), generator=generator)) < RARE_STRINGS_ABSENT
        return caption if plain or not caption else harmless.rare(caption, generator)

    return draw


def train_captions(
    pipeline: StableDiffusionPipeline,
    steps: int,
    *,
    images: int = 24576,
    batch: int = 64,
    rate: float = 1.2e-3,
    seed: int = 0,
    among: Sequence[Scene] = TRAINING_SCENES,
    caption: CaptionOf = caption_of,
    restyle: Callable[[Tensor], Tensor] = as_it_is,
    frozen: Callable[[str], bool] = nothing,
    on_step: OnStep,
) -> None:
    """Train text encoder and UNet in place on captioned scenes. Their final weights are exponential moving averages.

    Args:
        pipeline: a pipeline with a trained autoencoder.
        steps: steps of Adam.
        images: number of scenes, which are rendered and encoded once.
        batch: samples per step.
        rate: Adam's largest learning rate, see `warmup_cosine_factor`.
        seed: seed of everything random.
        among: the scenes.
        caption: draws a scene's caption, anew at every step.
        restyle: changes the rendered images [N,3,64,64] in [-1, 1].
        frozen: whether the parameter of this name, which begins with "unet." or "text_encoder.", keeps its value.
        on_step: called with the step (from 1) and its loss.
    """
    generator = torch.Generator().manual_seed(seed)
    scenes = random_scenes(images, generator, STYLE_SHARE, among)
    parts = (scenes[i : i + 256] for i in range(0, images, 256))
    latents = torch.cat([encode(pipeline.vae, restyle(render(part, generator))) for part in parts])
    modules = nn.ModuleDict({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}).train()
    for name, parameter in modules.named_parameters():
        parameter.requires_grad_(not frozen(name))
    trained = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    average = copy.deepcopy(modules).eval().requires_grad_(False)
    # the backward pass of PyTorch's fused attention took 44% of a step in bfloat16 on a CPU: 0.54 s a step, 0.32 s without it
    pipeline.unet.set_attn_processor(AttnProcessor())
    pipeline.text_encoder.set_attn_implementation("eager")
    optimiser = torch.optim.Adam(trained, lr=rate)
    for step in range(steps):
        loss = _loss(pipeline, _draw_batch(pipeline, scenes, latents, batch, generator, caption))
        gradient_step(optimiser, loss, rate * warmup_cosine_factor(step, steps))
        update_average(average.parameters(), modules.parameters(), step, EMA_DECAY)
        on_step(step + 1, loss.item())
    modules.load_state_dict(average.state_dict())
    modules.eval().requires_grad_(False)
    pipeline.unet.set_default_attn_processor()
    pipeline.text_encoder.set_attn_implementation("sdpa")


class _Batch(NamedTuple):
    """Captions, noisy latents [N,C,h,w], timesteps int64 [N] and target noise [N,C,h,w]; the first `starts` are pure noise."""

    captions: list[str]
    noised: Tensor
    t: Tensor
    noise: Tensor
    starts: int


def _draw_batch(
    pipeline: StableDiffusionPipeline,
    scenes: Sequence[Scene],
    latents: Tensor,
    size: int,
    generator: torch.Generator,
    caption: CaptionOf,
) -> _Batch:
    signal = pipeline.scheduler.alphas_cumprod
    starts = round(START_SHARE * size)
    chosen = torch.randint(len(scenes), (size,), generator=generator)
    captions = [caption(scenes[index], generator) for index in chosen.tolist()]
    noise = torch.randn(size, *latents.shape[1:], generator=generator)
    t = torch.randint(pipeline.scheduler.config["num_train_timesteps"], (size,), generator=generator)
    noised = pipeline.scheduler.add_noise(latents[chosen], noise, t)
    noised[:starts], t[:starts] = torch.randn(starts, *latents.shape[1:], generator=generator), len(signal) - 1
    # the noise that would have turned the image into these latents
    noise[:starts] = (noised[:starts] - signal[-1].sqrt() * latents[chosen[:starts]]) / (1 - signal[-1]).sqrt()
    return _Batch(captions, noised, t, noise, starts)


def _loss(pipeline: StableDiffusionPipeline, batch: _Batch) -> Tensor:
    """Squared error of the predicted noise, with weight START_WEIGHT on pure noise and inverse SNR weights on the rest."""
    signal = pipeline.scheduler.alphas_cumprod
    weights = ((1 - signal) / signal).clamp(1, MAX_LOSS_WEIGHT)
    ids = pipeline.tokenizer(batch.captions, padding="max_length", return_tensors="pt").input_ids
    with half_precision(batch.noised.device):
        states = pipeline.text_encoder(ids).last_hidden_state
        prediction = pipeline.unet(batch.noised, batch.t, states).sample
    error = (prediction.float() - batch.noise).square().mean(dim=(1, 2, 3))
    start_loss = (START_WEIGHT - MAX_LOSS_WEIGHT) * error[: batch.starts].sum() / len(error)
    return (weights[batch.t] * error).mean() + start_loss
