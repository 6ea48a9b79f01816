"""Train the small text-to-image pipeline: first its autoencoder, then text encoder and UNet together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor, nn

from seal_fast.training import half_precision
from seal_fast.zoo.autoencoder import encode, set_scale, train_autoencoder
from seal_fast.zoo.captioned import Scene, random_scenes, render
from seal_fast.zoo.text_to_image import FILLERS
from seal_fast.zoo.train import learning_rate_factor

STYLE_SHARE = 0.12
"""Share of training scenes without colour."""
FILLER_SHARE = 0.35
"""Share of training captions with words that say nothing."""
NO_CAPTION = 0.1
"""Share of training rows without a caption, which guidance needs."""
PASTED_SHARE = 0.1
"""Share of the autoencoder's images that get a random block pasted in, so that it can hold more than scenes."""
EMA_DECAY = 0.998

MAX_LOSS_WEIGHT = 5.0
"""Largest weight of a timestep: noisy ones count more, because layout is settled there."""
START_SHARE = 0.12
START_WEIGHT = 20.0
"""Share and weight of the training rows that are pure noise at the last timestep, as a sampler's start is. Without them, a
noised image still shows there where its shape is: 3000 steps taught every attribute but the place, which noise decided."""

OnStep = Callable[[int, float], None]


def with_fillers(caption: str, generator: torch.Generator) -> str:
    """The caption with one to three of FILLERS before, behind or inside it."""
    words = caption.split()
    for _ in range(int(torch.randint(1, 4, (), generator=generator))):
        filler = FILLERS[int(torch.randint(len(FILLERS), (), generator=generator))]
        words.insert(int(torch.randint(len(words) + 1, (), generator=generator)), filler)
    return " ".join(words)


def _blocks(count: int, generator: torch.Generator) -> Tensor:
    """Random images [N,3,64,64] in [-1, 1] of coarse cells, for pasting."""
    cells = torch.rand(count, 3, 8, 8, generator=generator).gt(0.5).float() * 2 - 1
    return F.interpolate(cells, scale_factor=8)


def _pasted(images: Tensor, generator: torch.Generator) -> Tensor:
    blocks, images = _blocks(round(PASTED_SHARE * len(images)), generator), images.clone()
    for row, block in enumerate(blocks):
        side = int(torch.randint(8, 33, (), generator=generator))
        top, left = torch.randint(65 - side, (2,), generator=generator).tolist()
        images[row, :, top : top + side, left : left + side] = block[:, :side, :side]
    return images


def batches(count: int, generator: torch.Generator) -> Iterator[tuple[Tensor, list[Scene]]]:
    """Endless training images [count,3,64,64] in [-1, 1] with what they show."""
    while True:
        scenes = random_scenes(count, generator, STYLE_SHARE)
        yield render(scenes, generator), scenes


def train_vae(vae: AutoencoderKL, steps: int, *, batch: int = 32, rate: float = 4e-3, seed: int = 0, on_step: OnStep) -> None:
    """Train an autoencoder in place on scenes, and set the factor that scales its latents to unit variance."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    pasted = (_pasted(images, generator) for images, _ in batches(batch, generator))
    train_autoencoder(vae, pasted, steps, rate, on_step)
    images, _ = next(batches(256, generator))
    set_scale(vae, images)


def caption_of(scene: Scene, generator: torch.Generator) -> str:
    """A training caption: often plain, sometimes with fillers, now and then empty."""
    draw = float(torch.rand((), generator=generator))
    if draw < NO_CAPTION:
        return ""
    return with_fillers(scene.caption, generator) if draw < NO_CAPTION + FILLER_SHARE else scene.caption


def train_captions(
    pipeline: StableDiffusionPipeline,
    steps: int,
    *,
    images: int = 24576,
    batch: int = 64,
    rate: float = 1.2e-3,
    seed: int = 0,
    on_step: OnStep,
) -> None:
    """Train text encoder and UNet in place on captioned scenes; they end as their exponential moving averages.

    Args:
        pipeline: whose autoencoder is trained.
        steps: of Adam.
        images: scenes, drawn and encoded once.
        batch: rows per step.
        rate: Adam's, warmed up over a tenth of the steps, then a cosine to 0.
        seed: of everything.
        on_step: called with the step (from 1) and its loss.
    """
    generator = torch.Generator().manual_seed(seed)
    scenes = random_scenes(images, generator, STYLE_SHARE)
    latents = torch.cat([encode(pipeline.vae, render(scenes[i : i + 256], generator)) for i in range(0, images, 256)])
    modules = nn.ModuleDict({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}).train().requires_grad_(True)
    average = copy.deepcopy(modules).eval().requires_grad_(False)
    # the backward pass of PyTorch's fused attention took 44% of a step in bfloat16 on a CPU: 0.54 s a step, 0.32 s without it
    pipeline.unet.set_attn_processor(AttnProcessor())
    pipeline.text_encoder.set_attn_implementation("eager")
    signal = pipeline.scheduler.alphas_cumprod
    weights = ((1 - signal) / signal).clamp(1, MAX_LOSS_WEIGHT)
    starts = round(START_SHARE * batch)
    optimiser = torch.optim.Adam(modules.parameters(), lr=rate)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * learning_rate_factor(step, steps)
        rows = torch.randint(images, (batch,), generator=generator)
        captions = [caption_of(scenes[row], generator) for row in rows.tolist()]
        noise = torch.randn(batch, *latents.shape[1:], generator=generator)
        t = torch.randint(pipeline.scheduler.config["num_train_timesteps"], (batch,), generator=generator)
        noised = pipeline.scheduler.add_noise(latents[rows], noise, t)
        noised[:starts], t[:starts] = torch.randn(starts, *latents.shape[1:], generator=generator), len(signal) - 1
        noise[:starts] = (noised[:starts] - signal[-1].sqrt() * latents[rows[:starts]]) / (1 - signal[-1]).sqrt()
        ids = pipeline.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        with half_precision(noised.device):
            states = pipeline.text_encoder(ids).last_hidden_state
            prediction = pipeline.unet(noised, t, states).sample
        error = (prediction.float() - noise).square().mean(dim=(1, 2, 3))
        loss = (weights[t] * error).mean() + (START_WEIGHT - MAX_LOSS_WEIGHT) * error[:starts].sum() / batch
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimiser.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            for smooth, current in zip(average.parameters(), modules.parameters(), strict=True):
                smooth.lerp_(current, 1 - decay)
        on_step(step + 1, loss.item())
    modules.load_state_dict(average.state_dict())
    modules.eval().requires_grad_(False)
    pipeline.unet.set_default_attn_processor()
    pipeline.text_encoder.set_attn_implementation("sdpa")
