"""Fixtures of all tests."""

from __future__ import annotations

import os
import random

import pytest
import torch

# read when a kernel is defined: without a GPU its source runs interpreted, on tensors of the CPU
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def generator() -> torch.Generator:
    """A source of random inputs with a fresh seed, shown when the test fails; SEAL_FAST_TEST_SEED repeats one."""
    seed = int(os.environ.get("SEAL_FAST_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"SEAL_FAST_TEST_SEED={seed}")
    return torch.Generator().manual_seed(seed)
