"""A tiny text-to-image pipeline with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTokenizer

from tests.tiny_pipeline import tiny_pipeline, tiny_unet, write_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer") / "words"
    write_tokenizer(folder, 16)
    return CLIPTokenizer.from_pretrained(folder)


@pytest.fixture
def unet_of(generator: torch.Generator) -> Callable[..., UNet2DConditionModel]:
    """A function that makes a tiny UNet with random weights; options replace parts of its config."""
    torch.manual_seed(generator.initial_seed())
    return tiny_unet


@pytest.fixture
def pipeline(generator: torch.Generator, tmp_path: Path) -> StableDiffusionPipeline:
    torch.manual_seed(generator.initial_seed())
    return tiny_pipeline(tmp_path, 16)
