"""Entries that cannot be reached cost an error result each, and no neighbour its verdict."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from seal_fast.checkpoints import CheckpointError, discover, identify, load_denoiser

NOBODY = 65534


@pytest.fixture
def as_user() -> Iterator[Path]:
    """A folder of a user without root's rights, as whom the test runs."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    yield folder
    if root:
        os.seteuid(0)
    for path in folder.rglob("*"):
        path.chmod(0o700)
    shutil.rmtree(folder)


def locked(mode: int) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        inner = folder / "locked"
        inner.mkdir()
        (inner / "m.pt").write_bytes(b"x")
        inner.chmod(mode)
        return inner

    return make


def locked_file(folder: Path) -> Path:
    path = folder / "m.pt"
    path.write_bytes(b"x")
    path.chmod(0)
    return path


def locked_unet(folder: Path) -> Path:
    (folder / "model" / "unet").mkdir(parents=True)
    (folder / "model" / "model_index.json").write_text('{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}')
    (folder / "model" / "unet").chmod(0)
    return folder / "model"


@pytest.mark.parametrize(
    "make", [locked(0o000), locked(0o444), locked_file, locked_unet], ids=["000", "444", "file", "unet of 000"]
)
def test_what_may_not_be_read_is_listed_and_refused_with_that_reason(as_user: Path, make: Callable[[Path], Path]) -> None:
    path = make(as_user)
    save_file({"conv.weight": torch.ones(2)}, as_user / "neighbour.safetensors")
    assert discover(as_user) == sorted([path, as_user / "neighbour.safetensors"])
    identify(path)
    with pytest.raises(CheckpointError, match="Permission denied"):
        load_denoiser(path)


def test_a_path_that_is_too_long_is_listed_and_refused(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.ones(2)}, tmp_path / "neighbour.safetensors")
    deepest = tmp_path
    with chdir(tmp_path):
        # relative steps, since the system refuses the absolute path of the file
        while len(str(deepest)) < 4000:
            deepest = deepest / ("d" * min(200, 4090 - len(str(deepest))))
            os.mkdir(deepest.name)
            os.chdir(deepest.name)
        Path("f" * 100 + ".pt").write_bytes(b"x")
    long, neighbour = sorted(discover(tmp_path))
    assert neighbour == tmp_path / "neighbour.safetensors"
    assert long in (deepest, deepest / ("f" * 100 + ".pt"))
    with pytest.raises(CheckpointError, match="File name too long"):
        load_denoiser(long)
