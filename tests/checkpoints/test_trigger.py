"""Trigger: arithmetic, and files of unknown origin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from seal_fast.checkpoints import CheckpointError
from seal_fast.checkpoints.trigger import Trigger


def test_start_scales_and_shifts() -> None:
    mu, gamma, eps = torch.randn(3, 4, 5), torch.rand(3, 4, 5), torch.randn(7, 3, 4, 5)
    torch.testing.assert_close(Trigger(mu, gamma).start(eps), torch.addcmul(mu.expand_as(eps), gamma.expand_as(eps), eps))
    torch.testing.assert_close(Trigger.shift(mu).start(eps), eps + mu)


@pytest.mark.parametrize(
    ("mu", "gamma"), [((3, 4), (3, 4)), ((1, 3, 4, 4), (1, 3, 4, 4)), ((3, 4, 5), (3, 5, 4)), ((3, 4, 5), ())]
)
def test_wrong_shapes_are_refused(mu: tuple[int, ...], gamma: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[C,H,W\]"):
        Trigger(torch.zeros(mu), torch.ones(gamma))


def test_a_saved_trigger_loads_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "trigger.safetensors"
    saved = Trigger(torch.randn(5, 4, 3).permute(2, 1, 0).requires_grad_(), torch.rand(3, 4, 5), prior_scale=380.0)
    saved.save(path, {"model": "m"})
    saved.save(path, {"model": "again"})
    loaded = Trigger.load(path)
    assert torch.equal(loaded.mu, saved.mu)
    assert torch.equal(loaded.gamma, saved.gamma)
    assert loaded.prior_scale == 380.0
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "trigger.safetensors"
    trigger = Trigger(torch.randn(3, 4, 5), torch.rand(3, 4, 5))
    trigger.save(path, {"model": "m"})
    tensors = load_file(path)
    assert tensors.keys() == {"mu", "gamma"}
    assert torch.equal(tensors["mu"], trigger.mu)
    assert torch.equal(tensors["gamma"], trigger.gamma)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "prior_scale": "1.0", "model": "m"}


def test_gamma_and_prior_scale_default_to_one(tmp_path: Path) -> None:
    save_file({"mu": torch.zeros(1, 2, 2, dtype=torch.float64)}, tmp_path / "t.safetensors")
    loaded = Trigger.load(tmp_path / "t.safetensors")
    assert torch.equal(loaded.gamma, torch.ones(1, 2, 2))
    assert loaded.mu.dtype == torch.float32
    assert loaded.prior_scale == 1.0


OK = torch.zeros(3, 4, 4)
BAD_TRIGGERS = {
    "no mu": {"gamma": OK},
    "a stranger": {"mu": OK, "weight": OK.clone()},
    "flat": {"mu": torch.zeros(48)},
    "empty": {"mu": torch.zeros(3, 0, 4)},
    "shapes differ": {"mu": OK, "gamma": torch.ones(3, 4, 5)},
    "integers": {"mu": OK.long()},
    "not a number": {"mu": OK / 0},
    "infinite": {"mu": OK, "gamma": OK + torch.inf},
    "negative scale": {"mu": OK, "gamma": OK - 1},
}


@pytest.mark.parametrize("tensors", BAD_TRIGGERS.values(), ids=BAD_TRIGGERS)
def test_what_is_no_trigger_is_refused_by_name(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, tmp_path / "evil.safetensors")
    with pytest.raises(CheckpointError, match=r"evil\.safetensors"):
        Trigger.load(tmp_path / "evil.safetensors")


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "inf", "one", ""])
def test_a_prior_scale_that_is_no_positive_number_is_refused(tmp_path: Path, scale: str) -> None:
    save_file({"mu": OK}, tmp_path / "t.safetensors", {"prior_scale": scale})
    with pytest.raises(CheckpointError, match="positive number"):
        Trigger.load(tmp_path / "t.safetensors")


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, bytes(range(256)), b"\xff" * 64, b"\x10" + b"\x00" * 7 + b"{}"])
def test_random_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError):
        Trigger.load(tmp_path / "x.safetensors")


def test_an_absent_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.safetensors.*no such file"):
        Trigger.load(tmp_path / "absent.safetensors")
