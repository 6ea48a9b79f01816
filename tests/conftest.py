"""Fixtures of all tests."""

from __future__ import annotations

import os
import random

import pytest
import torch

# read when a kernel is defined: without a GPU its source runs interpreted, on tensors of the CPU
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m gpu` also selects what asks for the fixture."""
    for item in items:
        if "gpu" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")


@pytest.fixture
def gpu() -> None:
    """Skips where torch sees none."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device; without a GPU the test runs on the CPU only."""
    if request.param == "cuda":
        request.getfixturevalue("gpu")
    return request.param


@pytest.fixture
def generator() -> torch.Generator:
    """A source of random inputs with a fresh seed, shown when the test fails; SEAL_FAST_TEST_SEED repeats one."""
    seed = int(os.environ.get("SEAL_FAST_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"SEAL_FAST_TEST_SEED={seed}")
    return torch.Generator().manual_seed(seed)
