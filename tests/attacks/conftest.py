"""A text-to-image pipeline small enough to train in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests.tiny_pipeline import tiny_pipeline


@pytest.fixture
def pipeline(generator: torch.Generator, tmp_path: Path) -> StableDiffusionPipeline:
    torch.manual_seed(generator.initial_seed())
    return tiny_pipeline(tmp_path)
