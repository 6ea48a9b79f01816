"""Write a sealed network: the layout of the checkpoint it came from, whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers.models.unets.unet_2d import UNet2DModel
from torch import nn

from seal_fast.checkpoints.diffusers_folder import INDEX
from seal_fast.checkpoints.errors import CheckpointError
from seal_fast.checkpoints.files import inside, read_json, weight_size

SCHEDULERS = ("scheduler/scheduler_config.json", "scheduler_config.json")
PART_SUFFIXES = (".json", ".safetensors")
"""Files of a pipeline's other parts that are kept: configs, and weights that need no pickle."""


def check_target(out: Path, source: Path) -> None:
    """Refuse an output folder that would harm something.

    Raises:
        CheckpointError: `out` is a file or holds something, or lies in the checkpoint `source`.
    """
    out, source = Path(out), Path(source)
    if os.path.lexists(out) and not out.is_dir():
        raise CheckpointError(out, "is not a folder")
    if out.is_dir() and any(out.iterdir()):
        raise CheckpointError(out, "is not empty, and nothing is written over; name a new folder")
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(out, "lies in the model itself")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out` when the block ends, and is removed if it fails or is interrupted.

    Raises:
        OSError: it cannot be written, or `out` has been filled in the meantime.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        yield partial
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_network(network: nn.Module, source: Path, folder: Path) -> None:
    """Write `network` (float32 safetensors) and what stock diffusers needs beside it.

    A pipeline folder gives a pipeline folder with the other parts and the scheduler as they were; every other format (UNet
    folder, single file, TrojDiff list) a UNet folder, with its scheduler's config if it had one.

    Args:
        network: as `load_denoiser` built it from `source`, on any device.
        source: the checkpoint it came from; its files are copied, never run.
        folder: existing, empty.

    Raises:
        CheckpointError: a part of the pipeline leaves its folder, or has weights in pickles only.
        TypeError: not a network of `load_denoiser`.
    """
    if not isinstance(network, UNet2DModel):
        raise TypeError(f"a UNet2DModel was expected, not {type(network).__name__}")
    index = inside(source, INDEX) if source.is_dir() else None
    if index is None:
        network.save_pretrained(folder)
        _copy_schedulers(source, folder)
        return
    shutil.copyfile(index, folder / INDEX)
    # a pipeline whose parts lie side by side stays one
    network.save_pretrained(folder / "unet" if os.path.lexists(source / "unet") else folder)
    _copy_schedulers(source, folder)
    for name, entry in read_json(index).items():
        if isinstance(entry, list) and name not in ("unet", "scheduler") and entry[0] is not None:
            _copy_part(source, name, folder)


def _copy_schedulers(source: Path, folder: Path) -> None:
    for name in SCHEDULERS if source.is_dir() else ():
        if path := inside(source, name):
            read_json(path)
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)


def _copy_part(source: Path, name: str, folder: Path) -> None:
    """Another part of a pipeline, such as the decoder of latent diffusion."""
    part = source / name
    if name != os.path.basename(name) or part.is_symlink() or not part.is_dir():
        raise CheckpointError(source / INDEX, f"its part {name[:80]!r} is no folder of the checkpoint")
    files = [path for path in sorted(part.iterdir()) if path.suffix in PART_SUFFIXES]
    if not any(path.suffix == ".safetensors" for path in files) and any(
        path.suffix in (".bin", ".pt") for path in part.iterdir()
    ):
        raise CheckpointError(part, "its weights are pickles only, which are not copied; convert them to safetensors")
    (folder / name).mkdir()
    for path in files:
        inside(source, f"{name}/{path.name}")
        weight_size(path)
        shutil.copyfile(path, folder / name / path.name)
