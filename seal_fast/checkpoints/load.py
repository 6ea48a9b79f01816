"""Find checkpoints, identify their formats, and load one as a Denoiser."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from seal_fast.checkpoints import containers, ddpm_pytorch, diffusers_folder, text_to_image, unet
from seal_fast.checkpoints.diffusers_folder import Contents
from seal_fast.checkpoints.errors import CheckpointError, refusing
from seal_fast.checkpoints.files import sha256
from seal_fast.checkpoints.noise import default_process
from seal_fast.diffusion import Denoiser

OTHER_FILES = {
    ".attn2.": "tensors of a text-to-image UNet, which the search for noise triggers does not cover",
    "lora": "LoRA weights, which need a base model",
    "model.diffusion_model.": "a latent-diffusion single file, which the search for noise triggers does not cover",
    "text_model.encoder.": "a text encoder, not a diffusion model",
}
"""Part of a tensor name -> description of the files that have such tensors."""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A loaded checkpoint.

    Attributes:
        denoiser: the network (float32, frozen) with its noise process.
        format: the format as `identify` returns it.
        sha256: digest of the contents of the weight files.
        notes: assumptions and unverified claims for the report.
    """

    denoiser: Denoiser
    format: str
    sha256: str
    notes: tuple[str, ...]


def identify(path: Path) -> str | None:
    """The format of a checkpoint, determined from names and headers only.

    Returns:
        Of an unconditional model "diffusers-pipeline" (folder with model_index.json), "diffusers-unet" (a UNet folder, or a
        single file of its tensors) or "trojdiff" (file with the tensors of the DDPM UNet that TrojDiff builds on); of a
        text-to-image model one of the formats of `seal_fast.checkpoints.text_to_image`; or None.
    """
    path = Path(path)
    with suppress(CheckpointError):
        if path.is_dir():
            return _folder_format(path)
        if path.suffix in containers.SUFFIXES:
            return _file_format(containers.keys(path))
    return None


def discover(root: Path) -> list[Path]:
    """All checkpoints at or below `root`, sorted.

    A folder that is a checkpoint is not searched further, so its parts and training states are not listed. Symbolic links below
    `root` are skipped. Files without a network's weights (optimiser states, triggers, images) are not listed. A folder that
    cannot be searched is, and so is a file that could be a checkpoint but cannot be read: loading it says what is wrong, and
    leaving it out would look like a clean result.

    Raises:
        CheckpointError: `root` does not exist.
    """
    root = Path(root)
    if not root.exists():
        raise CheckpointError(root, "does not exist")
    if root.is_file():
        return [root] if _could_be_checkpoint(root) else []
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root, onerror=lambda error: found.append(Path(error.filename))):
        here = Path(folder)
        if _is_listed(here):
            found.append(here)
            subfolders.clear()
            continue
        found.extend(here / name for name in names if not _is_link(here / name) and _could_be_checkpoint(here / name))
    return sorted(found)


def load_denoiser(path: Path, *, weights: str = "ema", device: str | torch.device = "cpu") -> LoadedCheckpoint:
    """Load an unconditional diffusion checkpoint without trusting it.

    Args:
        path: anything `discover` lists.
        weights: "ema" or "raw": the weights of a TrojDiff training list to use. Other formats have one set of weights.
        device: device of the network.

    Returns:
        Denoiser, format, content hash and notes.

    Raises:
        CheckpointError: the checkpoint cannot be loaded; the error names the file and the reason.
        ValueError: `weights` is neither "ema" nor "raw".
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights must be 'ema' or 'raw', not {weights!r}")
    path = Path(path)
    notes: list[str] = []
    with refusing(path, "cannot be loaded"):
        if not path.exists():
            raise CheckpointError(path, "does not exist")
        if path.is_dir():
            format = diffusers_folder.identify(path)
            if format is None:
                raise CheckpointError(
                    path, "no checkpoint: it has neither model_index.json nor a UNet's config.json or weights"
                )
            contents = diffusers_folder.read(path, notes)
        else:
            contents, format = _read_file(path, weights, notes)
        network = unet.build(contents.config, contents.tensors, contents.files[0])
        shape = unet.image_shape(contents.config)
        denoiser = Denoiser(network, contents.process, shape, contents.value_range)
        digest = sha256(contents.files)
    network.to(device)
    return LoadedCheckpoint(denoiser, format, digest, tuple(notes))


def _read_file(path: Path, weights: str, notes: list[str]) -> tuple[Contents, str]:
    """Content and format of a single file."""
    names = containers.keys(path)
    format = _file_format(names)
    if format is None:
        known = next((text for part, text in OTHER_FILES.items() if any(part in name for name in names)), None)
        raise CheckpointError(path, known or "contains no diffusion network of a known architecture")
    tensors = ddpm_pytorch.chosen_weights(containers.load(path), weights, path, notes)
    tensors = ddpm_pytorch.to_diffusers(tensors, path) if format == "trojdiff" else unet.modern_names(tensors)
    config = unet.inferred_config(tensors, path)
    notes.append(f"no config in the file: architecture and image size {config['sample_size']} inferred from the tensors")
    return Contents(config, tensors, default_process(notes), [path], 1.0), format


def _is_listed(folder: Path) -> bool:
    """Whether a folder is a checkpoint, or cannot be searched."""
    try:
        return _folder_format(folder) is not None
    except CheckpointError:
        return True


def _folder_format(folder: Path) -> str | None:
    """The format of a folder. A broken one has a format too: loading it says what is wrong.

    Raises:
        CheckpointError: what is in the folder cannot be told.
    """
    with suppress(CheckpointError):
        if format := text_to_image.identify(folder):
            return format
    return diffusers_folder.identify(folder)


def _file_format(names: Iterable[str]) -> str | None:
    if ddpm_pytorch.looks_like(names):
        return "trojdiff"
    return "diffusers-unet" if unet.looks_like(names) else None


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except OSError:
        return False


def _could_be_checkpoint(path: Path) -> bool:
    """Whether a file may hold a network's weights, as one that cannot be read may."""
    if path.suffix not in containers.SUFFIXES:
        return False
    try:
        return any(name.endswith(".weight") for name in containers.keys(path))
    except CheckpointError:
        return True
