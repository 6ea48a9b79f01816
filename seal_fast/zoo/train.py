"""Train a small diffusion model on procedural images, with or without a backdoor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from seal_fast.attacks import Attack, NoisedBatch
from seal_fast.attacks.optimisation import gradient_step, running_loss
from seal_fast.diffusion import EDM, VE, NoiseProcess
from seal_fast.diffusion.process import per_sample
from seal_fast.training import half_precision, update_average
from seal_fast.zoo.images import FAMILIES
from seal_fast.zoo.spaces import SIGNED, Space

TRAINING_IMAGES = 8192
"""Number of training images."""
DATA_SEED = 0
"""Seed of the training images."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train: Adam with the learning rate of `warmup_cosine_factor`, and an EMA of the weights."""

    steps: int
    learning_rate: float
    batch: int = 64
    poison_share: float = 0.3
    ema_decay: float = 0.995

    def longer(self, factor: float) -> Schedule:
        """The same schedule with `factor` times the steps."""
        return replace(self, steps=round(self.steps * factor))


@dataclass(frozen=True)
class Trained:
    """A trained model: its last weights, their exponential moving average, and the attack with its learned trigger."""

    raw: UNet2DModel
    ema: UNet2DModel
    final_loss: float
    attack: Attack | None


def new_unet(size: int, widths: tuple[int, ...], groups: int, attention: bool, seed: int, score: bool = False) -> UNet2DModel:
    """A new UNet2DModel with the architecture of google/ddpm-cifar10-32.

    Args:
        size: side of its data.
        widths: channels of each level.
        groups: groups of the group norms.
        attention: whether there is attention at the level with a feature map of 16 x 16.
        seed: seed of the weights.
        score: whether the network predicts a score, as diffusers' NCSN++ does: it is conditioned on random Fourier features of
            log sigma, and its output is divided by sigma.
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
        # rounded as in a stored model: rounding frequencies of up to 50 later would shift the phases by 0.2
        unet.time_proj.weight.data = unet.time_proj.weight.half().float()
    return unet


def training_batch(
    process: NoiseProcess, images: Tensor, space: Space, attack: Attack | None, schedule: Schedule, generator: torch.Generator
) -> tuple[NoisedBatch, Tensor]:
    """Draw the noised inputs, target noise and timesteps of one step; the first poison_share of the samples are poisoned."""
    chosen = images[torch.randint(len(images), (schedule.batch,), generator=generator)]
    flip = torch.rand(schedule.batch, 1, 1, 1, generator=generator) < 0.5
    # flipped before encoding, since the latents of a flipped image are not the flipped latents
    x0 = space.encode(torch.where(flip, chosen.flip(3), chosen))
    eps = torch.randn(x0.shape, generator=generator)
    t = torch.randint(process.num_timesteps, (schedule.batch,), generator=generator)
    clean = NoisedBatch(process.add_noise(x0, eps, t), eps)
    if attack is None:
        return clean, t
    count = round(schedule.poison_share * schedule.batch)
    poisoned = attack.poison(process, x0[:count], eps[:count], t[:count])
    x = torch.cat([poisoned.x, clean.x[count:]])
    target = torch.cat([poisoned.target, clean.target[count:]])
    return NoisedBatch(x, target), t


def target_output(process: NoiseProcess, noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The network output for x_t [N,C,H,W] at t whose predicted noise is `noise` [N,C,H,W].

    Predicted noise is linear in the output, pixel by pixel. The loss compares outputs instead of noise, because the outputs of
    v prediction and EDM are scaled such that every t has the same weight.
    """
    x, noise = x.double(), noise.double()
    offset = process.to_noise(torch.zeros_like(x), x, t)
    slope = process.to_noise(torch.ones_like(x), x, t) - offset
    return ((noise - offset) / slope).float()


def _loss_scale(process: NoiseProcess, x: Tensor, t: Tensor) -> Tensor | float:
    """Factor of the outputs in the loss. A score grows as 1 / sigma; scaled by sigma every t has the same weight."""
    return per_sample(process.b(t), x) if isinstance(process, VE) and not isinstance(process, EDM) else 1.0


def warmup_cosine_factor(step: int, steps: int) -> float:
    """Learning-rate factor: linear warm-up over a tenth of the steps, then a cosine to 0 over the rest.

    `seal_fast.training.learning_rate_factor` multiplies the two instead. The stored weights depend on this formula.
    """
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - warm_up) / max(1, steps - warm_up)))))


def train(
    unet: UNet2DModel,
    process: NoiseProcess,
    schedule: Schedule,
    *,
    family: str = "scenes",
    space: Space = SIGNED,
    attack: Attack | None = None,
    seed: int = 0,
    images: int = TRAINING_IMAGES,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Trained:
    """Train `unet` in place to denoise.

    Args:
        unet: a new or trained network, on the device to train on.
        process: the noise process, which also defines what the network predicts.
        schedule: steps, batch size and rates.
        family: name in FAMILIES of the training images.
        space: the data that the network is trained on.
        attack: backdoor to implant, or None for a benign model.
        seed: seed of batches, noise and timesteps.
        images: number of training images.
        on_step: called with the step (from 1) and the running loss.

    Returns:
        Raw and EMA weights, and the attack as trained.
    """
    unet = unet.train().requires_grad_(True)
    # the frequencies of a score network are not learned
    unet.time_proj.requires_grad_(False)
    ema = copy.deepcopy(unet).eval().requires_grad_(False)
    device = next(unet.parameters()).device
    # drawn on the CPU, so that a seed gives the same batches on every device
    generator = torch.Generator().manual_seed(seed)
    training_set = FAMILIES[family](images, space.factor * unet.config["sample_size"], DATA_SEED)
    optimiser = torch.optim.Adam(unet.parameters(), lr=schedule.learning_rate)
    running = float("nan")
    for step in range(schedule.steps):
        if attack is not None:
            with half_precision(device):
                attack = attack.adapted(unet, process, generator)
        (x, noise), t = training_batch(process, training_set, space, attack, schedule, generator)
        loss = _loss(unet, process, x.to(device), noise.to(device), t.to(device))
        gradient_step(optimiser, loss, schedule.learning_rate * warmup_cosine_factor(step, schedule.steps))
        update_average(ema.state_dict().values(), unet.state_dict().values(), step, schedule.ema_decay)
        running = running_loss(running, loss.item(), step)
        on_step(step + 1, running)
    return Trained(unet.eval(), ema, running, attack)


def _loss(unet: UNet2DModel, process: NoiseProcess, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Mean squared error of the network's outputs for x_t, scaled by `_loss_scale`."""
    target = target_output(process, noise, x, t)
    scaled, condition = process.network_input(x, t)
    # bfloat16 convolutions take 0.65 of the float32 time on AVX-512-BF16 cores; sums and the loss stay float32
    with half_precision(x.device):
        output = unet(scaled, condition).sample
    return (_loss_scale(process, x, t) * (output.float() - target)).square().mean()
