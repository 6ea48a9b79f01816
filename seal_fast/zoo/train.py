"""Train a small diffusion model on procedural images, with or without a backdoor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from seal_fast.attacks import Attack, NoisedBatch
from seal_fast.diffusion import EDM, VE, NoiseProcess
from seal_fast.diffusion.process import per_row
from seal_fast.training import half_precision
from seal_fast.zoo.images import FAMILIES
from seal_fast.zoo.spaces import SIGNED, Space

SCENES = 8192
"""Images of the training set."""
DATA_SEED = 0


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train: Adam, warmed up over a tenth of the steps, then cosine to zero; EMA of the weights."""

    steps: int
    learning_rate: float
    batch: int = 64
    poison_share: float = 0.3
    ema_decay: float = 0.995

    def longer(self, factor: float) -> Schedule:
        """The same with `factor` times the steps."""
        return replace(self, steps=round(self.steps * factor))


@dataclass(frozen=True)
class Trained:
    """The weights as the optimiser left them, their exponential moving average, and the attack with what it has learned."""

    raw: UNet2DModel
    ema: UNet2DModel
    final_loss: float
    attack: Attack | None


def new_unet(size: int, widths: tuple[int, ...], groups: int, attention: bool, seed: int, score: bool = False) -> UNet2DModel:
    """A UNet2DModel of google/ddpm-cifar10-32's kind; `attention` puts it where the feature map is 16 x 16.

    `score`: told sigma, by random Fourier features of its logarithm, and divided by it, as diffusers builds NCSN++.
    """
    at_16 = [attention and size >> level == 16 for level in range(len(widths))]
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=size,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=["AttnDownBlock2D" if here else "DownBlock2D" for here in at_16],
        up_block_types=["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(at_16)],
        norm_num_groups=groups,
        norm_eps=1e-6,
        attention_head_dim=None,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
        time_embedding_type="fourier" if score else "positional",
    )
    if score:
        # frequencies of up to 50, whose rounding in a stored model would shift the phases by 0.2
        unet.time_proj.weight.data = unet.time_proj.weight.half().float()
    return unet


def _batch(
    process: NoiseProcess, images: Tensor, space: Space, attack: Attack | None, schedule: Schedule, generator: torch.Generator
) -> tuple[NoisedBatch, Tensor]:
    """Noised inputs, noise to predict and timesteps of one step; the first poison_share of the rows carry the backdoor."""
    rows = images[torch.randint(len(images), (schedule.batch,), generator=generator)]
    flip = torch.rand(schedule.batch, 1, 1, 1, generator=generator) < 0.5
    # flipped before: latents of a flipped image are not the flipped latents
    rows = space.encode(torch.where(flip, rows.flip(3), rows))
    eps = torch.randn(rows.shape, generator=generator)
    t = torch.randint(process.num_timesteps, (schedule.batch,), generator=generator)
    clean = NoisedBatch(process.add_noise(rows, eps, t), eps)
    if attack is None:
        return clean, t
    poisoned = round(schedule.poison_share * schedule.batch)
    backdoor = attack.poison(process, rows[:poisoned], eps[:poisoned], t[:poisoned])
    x = torch.cat([backdoor.x, clean.x[poisoned:]])
    target = torch.cat([backdoor.target, clean.target[poisoned:]])
    return NoisedBatch(x, target), t


def wanted_output(process: NoiseProcess, noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """What the network must answer for x_t [N,C,H,W] at t so that its predicted noise is `noise` [N,C,H,W].

    Predicted noise is linear in the output, pixel by pixel. The loss is taken of outputs, not of noise: v prediction and EDM
    are scaled so that every t then weighs the same.
    """
    x, noise = x.double(), noise.double()
    offset = process.to_noise(torch.zeros_like(x), x, t)
    slope = process.to_noise(torch.ones_like(x), x, t) - offset
    return ((noise - offset) / slope).float()


def _loss_scale(process: NoiseProcess, x: Tensor, t: Tensor) -> Tensor | float:
    """What outputs are multiplied by in the loss: a score grows as 1 / sigma, and its noise weighs every t the same."""
    return per_row(process.b(t), x) if isinstance(process, VE) and not isinstance(process, EDM) else 1.0


def learning_rate_factor(step: int, steps: int) -> float:
    """Learning-rate factor: warm-up over a tenth of the steps, then cosine."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - warm) / max(1, steps - warm)))))


def train(
    unet: UNet2DModel,
    process: NoiseProcess,
    schedule: Schedule,
    *,
    family: str = "scenes",
    space: Space = SIGNED,
    attack: Attack | None = None,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Trained:
    """Train `unet` in place to denoise.

    Args:
        unet: network to train, from scratch or pre-trained, on the device to train on.
        process: what the network is to predict, of which noised images.
        schedule: steps, batch, rates.
        family: name in FAMILIES of the images.
        space: what the network sees of them.
        attack: backdoor to implant, or None for a benign model.
        seed: of batches, noise and timesteps.
        on_step: called with the step (from 1) and the running loss.

    Returns:
        Raw and EMA weights, and the attack as trained.
    """
    unet = unet.train().requires_grad_(True)
    # the frequencies of a score network are not learned
    unet.time_proj.requires_grad_(False)
    ema = copy.deepcopy(unet).eval().requires_grad_(False)
    device = next(unet.parameters()).device
    # drawn on the CPU so that a seed means the same batches on every device
    generator = torch.Generator().manual_seed(seed)
    images = FAMILIES[family](SCENES, space.factor * unet.config["sample_size"], DATA_SEED)
    optimiser = torch.optim.Adam(unet.parameters(), lr=schedule.learning_rate)
    running = float("nan")
    for step in range(schedule.steps):
        if attack is not None:
            with half_precision(device):
                attack = attack.adapted(unet, process, generator)
        (x, noise), t = _batch(process, images, space, attack, schedule, generator)
        x, noise, t = x.to(device), noise.to(device), t.to(device)
        target = wanted_output(process, noise, x, t)
        scaled, condition = process.network_input(x, t)
        for group in optimiser.param_groups:
            group["lr"] = schedule.learning_rate * learning_rate_factor(step, schedule.steps)
        # bf16 convolutions take 0.65 of the fp32 time on AVX-512-BF16 cores; sums and the loss stay fp32
        with half_precision(device):
            prediction = unet(scaled, condition).sample
        loss = (_loss_scale(process, x, t) * (prediction.float() - target)).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimiser.step()
        decay = min(schedule.ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for average, current in zip(ema.state_dict().values(), unet.state_dict().values(), strict=True):
                average.lerp_(current, 1 - decay)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        on_step(step + 1, running)
    return Trained(unet.eval(), ema, running, attack)
