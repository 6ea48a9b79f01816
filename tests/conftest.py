"""Fixtures for all tests."""

from __future__ import annotations

import os
import random

import pytest
import torch

# Triton reads this when a kernel is defined; without a GPU the kernel then runs interpreted, on CPU tensors
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that uses the fixture `gpu`, so that `-m gpu` selects it."""
    for item in items:
        if "gpu" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")


@pytest.fixture
def gpu() -> None:
    """Skip the test if torch sees no CUDA device."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Run the test on every device; without a GPU, on the CPU only."""
    if request.param == "cuda":
        request.getfixturevalue("gpu")
    return request.param


@pytest.fixture
def generator() -> torch.Generator:
    """A generator with a fresh seed, which is printed if the test fails; SEAL_FAST_TEST_SEED sets the seed."""
    seed = int(os.environ.get("SEAL_FAST_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"SEAL_FAST_TEST_SEED={seed}")
    return torch.Generator().manual_seed(seed)
