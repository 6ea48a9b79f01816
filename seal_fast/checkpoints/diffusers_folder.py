"""Read the folders that diffusers saves: a pipeline, or a UNet alone. Only JSON and tensors are read, never code."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from seal_fast.checkpoints import containers, unet
from seal_fast.checkpoints.errors import CheckpointError
from seal_fast.checkpoints.files import holds, inside, read_json
from seal_fast.checkpoints.noise import default_process, process_from_config
from seal_fast.diffusion import NoiseProcess

INDEX = "model_index.json"
WEIGHT_NAMES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.bin",
)
"""Weight files, the preferred one first."""
LATENT_VALUE_RANGE = 3.0
"""Value range assumed for latents, which are scaled to about unit variance."""


def identify(folder: Path) -> str | None:
    """ "diffusers-pipeline", "diffusers-unet", or None. A broken folder has a format too: loading it says what is wrong.

    Raises:
        CheckpointError: what is in the folder cannot be told, for instance without permission.
    """
    if holds(folder, INDEX):
        return "diffusers-pipeline"
    class_name = None
    try:
        if config := inside(folder, "config.json"):
            class_name = read_json(config).get("_class_name")
    except CheckpointError:
        pass
    if class_name is None:
        return "diffusers-unet" if any(holds(folder, name) for name in WEIGHT_NAMES) else None
    return "diffusers-unet" if str(class_name).startswith("UNet2D") else None


class Contents(NamedTuple):
    """The content of a checkpoint that the Denoiser is built from.

    Attributes:
        config: checked config of the UNet.
        tensors: tensors of the UNet, under diffusers' present names.
        process: the noise process.
        files: the weight files.
        value_range: see `seal_fast.diffusion.Denoiser`.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    process: NoiseProcess
    files: list[Path]
    value_range: float


def read(folder: Path, notes: list[str]) -> Contents:
    """Read a pipeline or UNet folder.

    Args:
        folder: the checkpoint.
        notes: list to which notes for the report are appended.

    Raises:
        CheckpointError: the network is not diffusers' unconditional UNet2DModel, or a file is broken, too large or outside the
            folder.
    """
    index = inside(folder, INDEX)
    value_range = 1.0
    if index is not None:
        value_range = _checked_value_range(read_json(index), index, notes)
        _note_claims(folder, notes)
    # diffusers also accepts a pipeline whose parts lie in one folder, such as google/ddpm-cifar10-32
    part = "unet/" if index is not None and os.path.lexists(folder / "unet") else ""
    config = _read_config(folder, part)
    tensors, files = read_weights(folder, part, WEIGHT_NAMES, notes)
    tensors = unet.modern_names(tensors)
    if config is None:
        config = unet.inferred_config(tensors, files[0])
        notes.append(f"no UNet config: architecture and image size {config['sample_size']} inferred from the tensors")
    return Contents(config, tensors, _read_process(folder, config, notes), files, value_range)


def _read_config(folder: Path, part: str) -> dict[str, Any] | None:
    """The checked config of the UNet, or None if there is none."""
    path = inside(folder, part + "config.json")
    config = read_json(path) if path else {}
    # BadDiffusion saves its training options under this name, so the content must be that of a UNet's config
    if path is None or not ("block_out_channels" in config or "_class_name" in config):
        return None
    return unet.checked_config(config, path)


def _checked_value_range(index: Mapping[str, Any], path: Path, notes: list[str]) -> float:
    """The value range of the data of a pipeline, which must be unconditional."""
    name = reprlib.repr(index.get("_class_name"))
    entry = index.get("unet")
    library, class_name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    if any(index.get(part) for part in ("transformer", "text_encoder", "prior")) or class_name == "UNet2DConditionModel":
        raise CheckpointError(
            path,
            f"a text-to-image or class-conditional pipeline ({name}), which the search for noise triggers does not cover",
        )
    if (library, class_name) != ("diffusers", "UNet2DModel"):
        raise CheckpointError(
            path, f"its unet is {reprlib.repr(entry)}; only diffusers' UNet2DModel is loaded; code in a checkpoint is never run"
        )
    if not index.get("vqvae"):
        return 1.0
    notes.append(
        f"latent diffusion: images here are latents, nearly all within +-{LATENT_VALUE_RANGE:g}; the decoder is not read"
    )
    return LATENT_VALUE_RANGE


def part_folder(root: Path, name: str) -> Path:
    """The folder of one part of a pipeline; CheckpointError if it is missing, a link, or not directly in the checkpoint."""
    folder = root / name
    if name != os.path.basename(name) or folder.is_symlink() or not folder.is_dir():
        raise CheckpointError(
            root / INDEX, f"its part {name[:80]!r} is no folder of the checkpoint: add it, or list it as [null, null]"
        )
    return folder


def _note_claims(folder: Path, notes: list[str]) -> None:
    """Note the trigger and target that BadDiffusion's args.json claims. They prove nothing: anybody can write such a file."""
    try:
        path = inside(folder, "args.json")
        claims = read_json(path) if path else {}
    except CheckpointError:
        notes.append("args.json is not readable and was ignored")
        return
    for key in ("trigger", "target"):
        if isinstance(claims.get(key), str):
            notes.append(f"args.json claims {key} {claims[key][:64]!r} (not verified)")


def read_weights(folder: Path, part: str, names: Sequence[str], notes: list[str]) -> tuple[dict[str, Tensor], list[Path]]:
    """The tensors of one part of a folder, and the files that hold them.

    Args:
        folder: the checkpoint; all files must lie in it.
        part: prefix of the part's files, "" or "unet/".
        names: possible weight files, the preferred one first.
        notes: list to which the files that exist but are not read are appended.

    Raises:
        CheckpointError: there is no such file, or it is broken, too large or outside the folder.
    """
    present = [name for name in names if inside(folder, part + name)]
    if not present:
        raise CheckpointError(folder / part, f"no weights: one of {', '.join(names)} expected")
    if len(present) > 1:
        notes.append(f"{part}{present[0]} used; {', '.join(present[1:])} not read")
    path = folder / part / present[0]
    files = _shards(folder, part, path) if path.suffix == ".json" else [path]
    tensors: dict[str, Tensor] = {}
    for file in files:
        loaded = containers.state_dict(containers.load(file), file)
        if twice := tensors.keys() & loaded.keys():
            raise CheckpointError(file, f"tensor {min(twice)[:80]} is in two shards")
        tensors |= loaded
    return tensors, files


def _shards(folder: Path, part: str, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(index, "weight_map must give a file name for every tensor")
    files = []
    for name in sorted(set(weight_map.values())):
        if not name.endswith(".safetensors") or name != os.path.basename(name):
            raise CheckpointError(index, f"shard {name[:80]!r} is not the name of a safetensors file in the same folder")
        path = inside(folder, part + name)
        if path is None:
            raise CheckpointError(index, f"shard {name[:80]!r} is missing")
        files.append(path)
    return files


def _read_process(folder: Path, config: Mapping[str, Any], notes: list[str]) -> NoiseProcess:
    path = inside(folder, "scheduler/scheduler_config.json") or inside(folder, "scheduler_config.json")
    if path is not None:
        return process_from_config(read_json(path), path, notes)
    if config.get("time_embedding_type") == "fourier":
        raise CheckpointError(
            folder, "no scheduler/scheduler_config.json, and a score network has no default noise range; add one"
        )
    return default_process(notes)
