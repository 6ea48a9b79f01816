"""Noise inputs from files of unknown origin."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from seal_fast.checkpoints import CheckpointError
from seal_fast.checkpoints.tensor_file import load_inputs


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, bytes(range(256)), b"\xff" * 64, b"\x10" + b"\x00" * 7 + b"{}"])
def test_random_bytes_are_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError):
        load_inputs(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["x.safetensors", "x.npy"])
def test_absent(tmp_path, name):
    with pytest.raises(CheckpointError, match="no such file"):
        load_inputs(tmp_path / name)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_inputs_from_numpy(tmp_path, dtype):
    array = np.random.default_rng().normal(size=(2, 3, 4, 5)).astype(dtype)
    np.save(tmp_path / "x.npy", array)
    read = load_inputs(tmp_path / "x.npy")
    assert read.dtype == torch.float32
    np.testing.assert_array_equal(read.numpy(), array.astype(np.float32))


def test_inputs_from_safetensors(tmp_path):
    noise = torch.randn(2, 3, 4, 5)
    save_file({"anything": noise}, tmp_path / "x.safetensors")
    assert torch.equal(load_inputs(tmp_path / "x.safetensors"), noise)
    save_file({"one": noise, "two": noise.clone()}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="one tensor, not 2"):
        load_inputs(tmp_path / "x.safetensors")


class Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('pickle was run')",)


def test_a_pickle_in_disguise_is_not_run(tmp_path):
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Payload()))
    np.save(tmp_path / "object.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "zip.npz", a=np.zeros(3))
    (tmp_path / "zip.npz").rename(tmp_path / "zip.npy")
    for name in ("pickle.npy", "object.npy", "zip.npy"):
        with pytest.raises(CheckpointError, match=name):
            load_inputs(tmp_path / name)


@pytest.mark.parametrize(
    "array", [np.zeros((3, 4, 4)), np.zeros((0, 3, 4, 4)), np.full((1, 3, 4, 4), np.nan), np.zeros((1, 3, 4, 4), int)]
)
def test_inputs_of_another_kind(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(CheckpointError):
        load_inputs(tmp_path / "x.npy")


def test_inputs_with_another_ending(tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"\.npy or \.safetensors"):
        load_inputs(tmp_path / "x.pkl")


def npy(header: str) -> bytes:
    """A .npy file with this header and a little data."""
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64)


@pytest.mark.parametrize(
    "header",
    [
        *(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}" for shape in ("(-4, 1)", f"({2**63},)", "(True, 1)")),
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**400},)}}",
        "{'descr': (",
        "'''x",
        "-" * 9000,
        "1" + "+1" * 4000,
        "{[]: 1}",
        "{(): 1, 'descr': 1, 'shape': 1}",
    ],
)
def test_a_broken_header_is_refused(tmp_path, header):
    (tmp_path / "x.npy").write_bytes(npy(header))
    with pytest.raises(CheckpointError, match=r"x\.npy"):
        load_inputs(tmp_path / "x.npy")


@pytest.mark.parametrize("name", ["x.npy", "x.safetensors"])
def test_a_fifo_is_refused_and_not_opened(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_inputs(tmp_path / name)
