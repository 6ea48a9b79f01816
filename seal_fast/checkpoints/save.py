"""Write an unlearned network in the layout of its original checkpoint, completely or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers.models.unets.unet_2d import UNet2DModel
from torch import nn

from seal_fast.checkpoints.diffusers_folder import INDEX, part_folder
from seal_fast.checkpoints.errors import CheckpointError
from seal_fast.checkpoints.files import inside, read_json, weight_size

SCHEDULER_CONFIGS = ("scheduler/scheduler_config.json", "scheduler_config.json")
PART_SUFFIXES = (".json", ".safetensors")
"""Files of a pipeline's other parts that are copied: configs, and weights that are no pickles."""


def check_target(out: Path, source: Path) -> None:
    """Refuse an output folder whose use would overwrite or change existing files.

    Raises:
        CheckpointError: `out` is a file, is not empty, or lies in the checkpoint `source`.
    """
    out, source = Path(out), Path(source)
    if os.path.lexists(out) and not out.is_dir():
        raise CheckpointError(out, "is not a folder")
    if out.is_dir() and any(out.iterdir()):
        raise CheckpointError(out, "is not empty, and no file is overwritten; choose a new folder")
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(out, "lies in the model's own folder; choose one outside it")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that is renamed to `out` when the block ends, and removed if the block fails or is interrupted.

    Raises:
        OSError: the folder cannot be written, or `out` is no longer empty when the block ends.
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
    """Write `network` (float32 safetensors) with the files that stock diffusers needs beside it.

    A pipeline folder becomes a pipeline folder with copies of its other parts and its scheduler. Every other format (UNet
    folder, single file, TrojDiff list) becomes a UNet folder, with the scheduler's config if there was one.

    Args:
        network: a network that `load_denoiser` built from `source`, on any device.
        source: the original checkpoint; its files are copied, never run.
        folder: an existing, empty folder.

    Raises:
        CheckpointError: a part of the pipeline lies outside the checkpoint, or its only weights are pickles.
        TypeError: `network` was not built by `load_denoiser`.
    """
    if not isinstance(network, UNet2DModel):
        raise TypeError(f"a UNet2DModel was expected, not {type(network).__name__}")
    index = inside(source, INDEX) if source.is_dir() else None
    if index is None:
        network.save_pretrained(folder)
        _copy_schedulers(source, folder)
        return
    shutil.copyfile(index, folder / INDEX)
    # a pipeline with all parts in one folder keeps that layout
    network.save_pretrained(folder / "unet" if os.path.lexists(source / "unet") else folder)
    _copy_schedulers(source, folder)
    for name, entry in read_json(index).items():
        if isinstance(entry, list) and name not in ("unet", "scheduler") and entry[0] is not None:
            _copy_part(source, name, folder)


def _copy_schedulers(source: Path, folder: Path) -> None:
    for name in SCHEDULER_CONFIGS if source.is_dir() else ():
        if path := inside(source, name):
            read_json(path)
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)


def _copy_part(source: Path, name: str, folder: Path) -> None:
    """Copy another part of a pipeline, such as the decoder of latent diffusion."""
    part = part_folder(source, name)
    files = [path for path in sorted(part.iterdir()) if path.suffix in PART_SUFFIXES]
    if not any(path.suffix == ".safetensors" for path in files) and any(
        path.suffix in (".bin", ".pt") for path in part.iterdir()
    ):
        raise CheckpointError(part, "its only weights are pickles, which are not copied; convert them to safetensors")
    (folder / name).mkdir()
    for path in files:
        inside(source, f"{name}/{path.name}")
        weight_size(path)
        shutil.copyfile(path, folder / name / path.name)
