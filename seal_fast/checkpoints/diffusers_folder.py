"""Folders as diffusers saves them: a pipeline, or a UNet alone. Only JSON and tensors are read; code beside them is not."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from seal_fast.checkpoints import containers, unet
from seal_fast.checkpoints.errors import CheckpointError
from seal_fast.checkpoints.files import inside, read_json
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
"""In the order they are preferred."""
LATENT_VALUE_RANGE = 3.0
"""Latents are scaled to about unit variance."""


def identify(folder: Path) -> str | None:
    """ "diffusers-pipeline", "diffusers-unet", or None. Broken folders of either kind count: loading says what is wrong."""
    if os.path.lexists(folder / INDEX):
        return "diffusers-pipeline"
    class_name = None
    try:
        if config := inside(folder, "config.json"):
            class_name = read_json(config).get("_class_name")
    except CheckpointError:
        pass
    if class_name is None:
        return "diffusers-unet" if any(os.path.lexists(folder / name) for name in WEIGHT_NAMES) else None
    return "diffusers-unet" if str(class_name).startswith("UNet2D") else None


def read(folder: Path, notes: list[str]) -> tuple[dict[str, Any], dict[str, Tensor], NoiseProcess, list[Path], float]:
    """Checked UNet config, tensors, noise process, weight files and value_range of the images of a pipeline or UNet folder.

    Args:
        folder: the checkpoint.
        notes: what a report should say is appended here.

    Raises:
        CheckpointError: not an unconditional UNet of diffusers' own, or anything broken, oversized or outside the folder.
    """
    index = inside(folder, INDEX)
    value_range = 1.0
    if index is not None:
        value_range = _checked_value_range(read_json(index), index, notes)
        _note_claims(folder, notes)
    # diffusers also accepts a pipeline whose parts lie side by side, as google/ddpm-cifar10-32 has them
    part = "unet/" if index is not None and os.path.lexists(folder / "unet") else ""
    config_path = inside(folder, part + "config.json")
    # BadDiffusion writes its training options under this name: only a UNet's own config counts
    config = read_json(config_path) if config_path else {}
    if config_path and ("block_out_channels" in config or "_class_name" in config):
        config = unet.checked_config(config, config_path)
    else:
        config = {}
    tensors, files = read_weights(folder, part, WEIGHT_NAMES, notes)
    tensors = unet.modern_names(tensors)
    if not config:
        config = unet.inferred_config(tensors, files[0])
        notes.append(f"no UNet config: structure and image size {config['sample_size']} inferred from the tensors")
    return config, tensors, _read_process(folder, config, notes), files, value_range


def _checked_value_range(index: Mapping[str, Any], path: Path, notes: list[str]) -> float:
    """The value_range of the images of a pipeline, which has to be unconditional."""
    name = reprlib.repr(index.get("_class_name"))
    entry = index.get("unet")
    library, class_name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    if any(index.get(part) for part in ("transformer", "text_encoder", "prior")) or class_name == "UNet2DConditionModel":
        raise CheckpointError(
            path, f"a text-to-image or class-conditional pipeline ({name}), which scan's noise-space test does not cover"
        )
    if (library, class_name) != ("diffusers", "UNet2DModel"):
        raise CheckpointError(
            path, f"its unet is {reprlib.repr(entry)}; only diffusers' UNet2DModel is loaded, code of a checkpoint is never run"
        )
    if not index.get("vqvae"):
        return 1.0
    notes.append(
        f"latent diffusion: images here are latents, most of them within {LATENT_VALUE_RANGE:g}; the decoder is not read"
    )
    return LATENT_VALUE_RANGE


def _note_claims(folder: Path, notes: list[str]) -> None:
    """What BadDiffusion's args.json says of itself. A hint for the reader: a suspect's author may have written anything."""
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
    """Tensors of one part of a folder, and the files they came from.

    Args:
        folder: the checkpoint, which no file may leave.
        part: prefix of the part's files, "" or "unet/".
        names: weight files that may hold it, in the order they are preferred.
        notes: files that are there and not read are named here.

    Raises:
        CheckpointError: no such file, or broken, oversized or outside the folder.
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
            raise CheckpointError(file, f"tensor {min(twice)[:80]} lies in two shards")
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
