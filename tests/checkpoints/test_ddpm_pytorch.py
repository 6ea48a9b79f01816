"""TrojDiff lists: the converted network equals an independent implementation of the original architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from seal_fast.checkpoints import CheckpointError, LoadedCheckpoint, identify, load_denoiser


def largest_difference(loaded: LoadedCheckpoint, network: nn.Module) -> float:
    x, t = torch.randn(2, *loaded.denoiser.shape), torch.randint(1000, (2,))
    with torch.no_grad():
        ours, theirs = loaded.denoiser(x, t), network(x, t)
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize(
    ("size", "widths", "blocks"),
    [(16, (64,), 1), (16, (64, 32), 2), (32, (32, 64, 64), 2), (64, (32, 32, 64, 96), 1), (32, (32, 96), 3)],
)
def test_the_converted_network_computes_the_same_function(
    tmp_path: Path, new_ddpm_pytorch: Callable, size: int, widths: tuple[int, ...], blocks: int
) -> None:
    network = new_ddpm_pytorch(size, widths, blocks)
    # features so small that the first norm's epsilon shows
    network.conv_in.requires_grad_(False).weight.mul_(1e-2)
    network.conv_in.bias.mul_(1e-2)
    torch.save(network.state_dict(), tmp_path / "ckpt.pth")
    loaded = load_denoiser(tmp_path / "ckpt.pth")
    assert loaded.denoiser.shape == (3, size, size)
    assert largest_difference(loaded, network) < 1e-5


def networks_of(path: Path, new_ddpm_pytorch: Callable) -> tuple[nn.Module, nn.Module]:
    """The raw and the EMA network of the fixture's file."""
    saved = torch.load(path, weights_only=True)
    raw, ema = new_ddpm_pytorch(16, (32, 64), 1), new_ddpm_pytorch(16, (32, 64), 1)
    raw.load_state_dict({name.removeprefix("module."): tensor for name, tensor in saved[0].items()})
    ema.load_state_dict(saved[4])
    return raw, ema


def test_ema_weights_are_the_default_and_raw_weights_an_option(trojdiff_file: Path, new_ddpm_pytorch: Callable) -> None:
    raw, ema = networks_of(trojdiff_file, new_ddpm_pytorch)
    assert identify(trojdiff_file) == "trojdiff"
    default, explicit = load_denoiser(trojdiff_file), load_denoiser(trojdiff_file, weights="raw")
    assert largest_difference(default, ema) < 1e-5 < largest_difference(default, raw)
    assert largest_difference(explicit, raw) < 1e-5
    assert "EMA weights used; the file also holds raw weights" in default.notes
    assert any("raw weights used" in note for note in explicit.notes)
    assert default.sha256 == explicit.sha256
    with pytest.raises(ValueError, match="ema"):
        load_denoiser(trojdiff_file, weights="best")


@pytest.mark.parametrize("tail", [[], [None], [{}]])
def test_without_ema_the_raw_weights_are_used_and_noted(trojdiff_file: Path, new_ddpm_pytorch: Callable, tail: list) -> None:
    raw, _ = networks_of(trojdiff_file, new_ddpm_pytorch)
    torch.save(torch.load(trojdiff_file, weights_only=True)[:4] + tail, trojdiff_file)
    loaded = load_denoiser(trojdiff_file)
    assert largest_difference(loaded, raw) < 1e-5
    assert "no EMA weights in the file: raw weights used" in loaded.notes


@pytest.mark.parametrize("name", ["ckpt.pth", "legacy.pt", "weights.safetensors"])
def test_a_bare_state_dict_is_read_from_every_container(tmp_path: Path, new_ddpm_pytorch: Callable, name: str) -> None:
    network = new_ddpm_pytorch(16, (32, 64), 1)
    state = {f"module.{key}": tensor for key, tensor in network.state_dict().items()}
    if name.endswith("safetensors"):
        save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=name != "legacy.pt")
    loaded = load_denoiser(tmp_path / name)
    assert loaded.format == "trojdiff"
    assert largest_difference(loaded, network) < 1e-5


@pytest.mark.parametrize("value", [[], [1, 2, 3], [{}, {}, 1, 2, {}]])
def test_lists_without_weights_are_refused(tmp_path: Path, value: list) -> None:
    torch.save([value, "temb.dense.0.weight"], tmp_path / "ckpt.pth")
    with pytest.raises(CheckpointError, match="state dict"):
        load_denoiser(tmp_path / "ckpt.pth")


def test_a_file_with_two_levels_with_attention_is_refused(trojdiff_file: Path) -> None:
    state = torch.load(trojdiff_file, weights_only=True)[4]
    state["down.1.attn.0.q.weight"] = torch.zeros(64, 64, 1, 1)
    torch.save(state, trojdiff_file)
    with pytest.raises(CheckpointError, match="2 levels with attention"):
        load_denoiser(trojdiff_file)
