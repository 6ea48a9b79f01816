"""Trigger: arithmetic, safe files, shape errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from seal_fast.diffusion import Trigger


def test_start_scales_and_shifts() -> None:
    mu, gamma, eps = torch.randn(3, 4, 5), torch.rand(3, 4, 5), torch.randn(7, 3, 4, 5)
    torch.testing.assert_close(Trigger(mu, gamma).start(eps), torch.addcmul(mu.expand_as(eps), gamma.expand_as(eps), eps))
    torch.testing.assert_close(Trigger.shift(mu).start(eps), eps + mu)


def test_saved_file_reloads_exactly(tmp_path: Path) -> None:
    mu = torch.randn(5, 4, 3).permute(2, 1, 0).requires_grad_()
    gamma = torch.rand(3, 4, 5)
    path = tmp_path / "new" / "trigger.safetensors"
    Trigger(mu, gamma).save(path, {"model": "m"})
    Trigger(mu, gamma).save(path, {"model": "again"})

    tensors = load_file(path)
    assert tensors.keys() == {"mu", "gamma"}
    assert torch.equal(tensors["mu"], mu)
    assert torch.equal(tensors["gamma"], gamma)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "model": "again"}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("mu", "gamma"), [((3, 4), (3, 4)), ((1, 3, 4, 4), (1, 3, 4, 4)), ((3, 4, 5), (3, 5, 4)), ((3, 4, 5), ())]
)
def test_wrong_shapes_are_refused(mu: tuple[int, ...], gamma: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[C,H,W\]"):
        Trigger(torch.zeros(mu), torch.ones(gamma))
