"""The data of latent models: scaled means that an autoencoder gives for images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from seal_fast.zoo import autoencoder
from seal_fast.zoo.images import FAMILIES

AUTOENCODER = "vqvae"
"""Folder of the autoencoder in a pipeline; diffusers' LDMPipeline uses this name for every class of autoencoder."""
STEPS = 1500
RATE = 3e-3
BATCH = 32
IMAGES = 1024
"""Training images per family."""


def _batches(size: int, images_per_family: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of images of every family, with random channels negated, since triggers and targets have all colours."""
    images = torch.cat([make(images_per_family, size, 0) for make in FAMILIES.values()])
    while True:
        batch = images[torch.randint(len(images), (BATCH,), generator=generator)]
        yield batch * (2 * torch.randint(2, (BATCH, 3, 1, 1), generator=generator) - 1)


@dataclass(frozen=True)
class Latents:
    """Latents [N,3,H,W] with unit variance over a family of images. See `seal_fast.zoo.spaces.Space`."""

    vae: AutoencoderKL
    factor = 2
    bounded = False

    @classmethod
    def load(cls, model: Path) -> Latents:
        """Load the autoencoder in the folder of a stored model, in single precision."""
        folder = model / AUTOENCODER
        # not from_pretrained, which writes the folder's path into the config
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
        vae.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
        return cls(vae.eval().requires_grad_(False))

    @classmethod
    def trained(
        cls,
        size: int,
        family: str,
        seed: int,
        on_step: Callable[[int, float], None],
        *,
        images: int = IMAGES,
        steps: int = STEPS,
    ) -> Latents:
        """Train a new autoencoder for images of `size` pixels.

        Its weights are rounded to half precision, so that storing it in half precision changes nothing.
        """
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            latent_channels=3,
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=8,
            sample_size=size,
            mid_block_add_attention=False,
        )
        batches = _batches(size, images, torch.Generator().manual_seed(seed))
        autoencoder.train_autoencoder(vae, batches, steps, RATE, on_step)
        autoencoder.set_scale(vae.half().float(), FAMILIES[family](images, size, 0))
        return cls(vae)

    def encode(self, images: Tensor) -> Tensor:
        return autoencoder.encode(self.vae, images)

    def decode(self, data: Tensor) -> Tensor:
        return autoencoder.decode(self.vae, data)
