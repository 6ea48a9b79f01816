"""What a latent model sees of an image: the means that an autoencoder gives."""

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
"""Its part of a pipeline's folder, as diffusers' LDMPipeline names it, whatever it is."""
STEPS = 1500
RATE = 3e-3
BATCH = 32
IMAGES = 1024
"""Per family."""


def _batches(size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless images of every family and their negatives, channel by channel: triggers and targets are of all colours."""
    images = torch.cat([make(IMAGES, size, 0) for make in FAMILIES.values()])
    while True:
        rows = images[torch.randint(len(images), (BATCH,), generator=generator)]
        yield rows * (2 * torch.randint(2, (BATCH, 3, 1, 1), generator=generator) - 1)


@dataclass(frozen=True)
class Latents:
    """Images are the means that an autoencoder gives, [N,3,H,W], at unit variance over a family of images."""

    vae: AutoencoderKL
    factor = 2
    bounded = False

    @classmethod
    def load(cls, model: Path) -> Latents:
        """Those of a stored model, in single precision."""
        folder = model / AUTOENCODER
        # not from_pretrained, which writes the folder's path into the config
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
        vae.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
        return cls(vae.eval().requires_grad_(False))

    @classmethod
    def trained(cls, size: int, family: str, seed: int, on_step: Callable[[int, float], None]) -> Latents:
        """Of a new autoencoder for images of `size` pixels; it is the same after it was stored in half precision."""
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
        autoencoder.train_autoencoder(vae, _batches(size, torch.Generator().manual_seed(seed)), STEPS, RATE, on_step)
        autoencoder.set_scale(vae.half().float(), FAMILIES[family](IMAGES, size, 0))
        return cls(vae)

    def encode(self, images: Tensor) -> Tensor:
        return autoencoder.encode(self.vae, images)

    def decode(self, images: Tensor) -> Tensor:
        return autoencoder.decode(self.vae, images)
