"""Fixtures of the tests of ops."""

from __future__ import annotations

import pytest
import torch

from seal_fast.ops.backends import CUDA


@pytest.fixture(
    params=[
        (1, (1,)),
        (6, (7,)),
        (5, (3, 17, 5)),
        (4, (3, 16, 16)),
        (15, (1, 33, 31)),
        (2, (3, 113, 113)),
    ],
    ids=str,
)
def sizes(request: pytest.FixtureRequest) -> tuple[int, tuple[int, ...]]:
    """How many items of which shape; the last is large enough for several threads."""
    return request.param


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run once on the fastest implementation and once on the reference."""
    monkeypatch.setenv("SEAL_FAST_BACKEND", request.param)


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """What kernels are compiled for, and what only the reference knows."""
    return request.param


@pytest.fixture
def kernels_without_gpu() -> None:
    """Skips where a launch would not fail: with a GPU it would use address 0."""
    if CUDA.module is None or torch.cuda.is_available():
        pytest.skip(f"CUDA kernels: {CUDA.reason or 'built, and there is a GPU'}")
