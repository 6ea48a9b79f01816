"""Latents of images, from an autoencoder that is hardly trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from seal_fast.zoo.images import glows
from seal_fast.zoo.latents import AUTOENCODER, Latents


@pytest.fixture(scope="module")
def latents() -> Latents:
    return Latents.trained(16, "glows", 3, lambda step, loss: None, images=64, steps=100)


def test_latents_have_half_the_size_and_decode_to_the_image(latents: Latents) -> None:
    images = glows(100, 16, 11) * torch.tensor([1.0, -1.0]).repeat(50).reshape(-1, 1, 1, 1)
    encoded = latents.encode(images)
    assert encoded.shape == (100, 3, 8, 8)
    restored = latents.decode(encoded)
    assert restored.shape == images.shape
    # an autoencoder that ignored its input could at best give grey for images and their negatives
    assert float((restored - images).square().mean()) < 0.75 * float(images.square().mean())
    assert not encoded.requires_grad
    assert not restored.requires_grad
    assert float(latents.encode(glows(200, 16, 14)).std()) == pytest.approx(1, abs=0.2)
    assert not latents.bounded


def test_a_stored_autoencoder_gives_the_same_latents_and_its_config_names_no_folder(latents: Latents, tmp_path: Path) -> None:
    images = glows(3, 16, 12)
    expected = latents.encode(images)
    latents.vae.half().save_pretrained(tmp_path / "one" / AUTOENCODER)
    latents.vae.float()
    loaded = Latents.load(tmp_path / "one")
    assert loaded.encode(images).equal(expected)
    loaded.vae.save_pretrained(tmp_path / "two")
    assert str(tmp_path) not in (tmp_path / "two" / "config.json").read_text()


def test_latents_agree_with_diffusers(latents: Latents, tmp_path: Path) -> None:
    latents.vae.save_pretrained(tmp_path)
    vae, images = AutoencoderKL.from_pretrained(tmp_path), glows(2, 16, 13)
    with torch.no_grad():
        encoded: Tensor = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
        decoded = vae.decode(encoded / vae.config.scaling_factor).sample
    torch.testing.assert_close(latents.encode(images), encoded)
    torch.testing.assert_close(latents.decode(encoded), decoded)
