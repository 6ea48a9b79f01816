"""Load an untrusted Stable Diffusion folder, and write it with new weights in one module.

A folder with a single component (a UNet, a text encoder) gets the other components from a base pipeline that the user names.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from seal_fast.checkpoints import components, containers
from seal_fast.checkpoints.diffusers_folder import INDEX, WEIGHT_NAMES, part_folder, read_weights
from seal_fast.checkpoints.errors import CheckpointError, refusing
from seal_fast.checkpoints.files import inside, parse_json, read_json, sha256, weight_size
from seal_fast.checkpoints.noise import process_from_config

PIPELINE, UNET, TEXT_ENCODER = "text-to-image-pipeline", "text-to-image-unet", "text-encoder"
"""The formats of text-to-image checkpoints."""
COMPONENTS: dict[str, Literal["unet", "text_encoder"]] = {UNET: "unet", TEXT_ENCODER: "text_encoder"}
"""Format of a single component -> the component."""

CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
"""Parts that are loaded, with their permitted classes. The scheduler's class is checked with its config."""
TEXT_WEIGHT_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model.fp16.safetensors",
    "pytorch_model.bin",
    "pytorch_model.fp16.bin",
)
WEIGHT_SUFFIXES = (".safetensors", ".bin")
KEPT_SUFFIXES = (".json", ".txt", *WEIGHT_SUFFIXES)
"""Files of a part that a saved pipeline keeps: configs, vocabularies and weights, no code."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
TOKENIZER_OPTIONS = ("model_max_length", "bos_token", "eos_token", "pad_token", "unk_token", "added_tokens_decoder")
MAX_TOKENIZER_BYTES = 64 << 20


@dataclass(frozen=True)
class LoadedPipeline:
    """A loaded text-to-image model.

    Attributes:
        pipeline: a diffusers StableDiffusionPipeline, float32, in evaluation mode, without safety checker.
        sha256: digest of the contents of the weight files that were read from the checkpoint itself, not from a base.
        format: PIPELINE; or UNET or TEXT_ENCODER if the checkpoint is that component alone.
        config_sha256: digest of the configs, vocabularies and other small files of the checkpoint and its base.
        notes: assumptions for the report.
    """

    pipeline: Any
    sha256: str
    format: str
    config_sha256: str
    notes: tuple[str, ...]


def identify(folder: Path) -> str | None:
    """PIPELINE, UNET, TEXT_ENCODER, or None, from names and configs only; CheckpointError if a config cannot be read."""
    if not folder.is_dir():
        return None
    index = inside(folder, INDEX)
    if index is not None:
        return PIPELINE if _listed(read_json(index), "text_encoder") else None
    config = inside(folder, "config.json")
    content = read_json(config) if config else {}
    if content.get("_class_name") == "UNet2DConditionModel":
        return UNET
    return TEXT_ENCODER if content.get("model_type") == "clip_text_model" else None


def load_pipeline(path: Path, *, base: Path | None = None, device: str | torch.device = "cpu") -> LoadedPipeline:
    """Load a text-to-image checkpoint without trusting it: only JSON and tensors are read, nothing is run or downloaded.

    Args:
        path: folder of a StableDiffusionPipeline, of a UNet2DConditionModel alone, or of a CLIPTextModel alone.
        base: folder of the pipeline that a single component belongs to; None for a whole pipeline.
        device: device of the networks.

    Raises:
        CheckpointError: the checkpoint or the base cannot be loaded; the error names the file and the reason.
    """
    path = Path(path)
    notes: list[str] = []
    with refusing(path, "cannot be loaded"):
        format = _checked_format(path, base)
        root = path if base is None else Path(base)
        _check_index(root)
        networks, own_files = _read_networks(path, root, format, notes)
        tokenizer, scheduler = _read_tokenizer(root), _read_scheduler(root, notes)
        config_digest = _config_digest(dict.fromkeys((path, root)))
        _check_fit(networks, tokenizer, path)
        digest = sha256(own_files)
    pipeline: Any = StableDiffusionPipeline(
        **networks,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # its bar would break the lines of our own progress
    pipeline.set_progress_bar_config(disable=True)
    for network in (pipeline.unet, pipeline.vae):
        # reduces the time of a forward pass of the zoo's UNet to three quarters
        network.to(memory_format=torch.channels_last)
    return LoadedPipeline(pipeline.to(device), digest, format, config_digest, tuple(notes))


def _checked_format(path: Path, base: Path | None) -> str:
    """The format of the checkpoint; CheckpointError if it is none, or if a base is missing or superfluous."""
    format = identify(path)
    if format is None:
        raise CheckpointError(
            path,
            f"no text-to-image checkpoint: a folder with {INDEX}, or one UNet or CLIP text encoder, is expected "
            "(noise triggers of other models are unlearned with --noise-trigger)",
        )
    if format == PIPELINE and base is not None:
        raise CheckpointError(path, "a whole pipeline, which takes no base: leave it out")
    if format != PIPELINE and base is None:
        raise CheckpointError(path, f"a {format} alone: name the pipeline it belongs to as its base (--base DIR)")
    return format


def _check_index(root: Path) -> None:
    """Raise CheckpointError unless the index is that of a complete StableDiffusionPipeline with known classes."""
    path = inside(root, INDEX)
    if path is None:
        raise CheckpointError(root, f"no {INDEX}: not a pipeline folder")
    index = read_json(path)
    if index.get("_class_name") != "StableDiffusionPipeline":
        raise CheckpointError(
            path, f"a {reprlib.repr(index.get('_class_name'))}; only diffusers' StableDiffusionPipeline is supported"
        )
    for name, classes in CLASSES.items():
        entry = index.get(name)
        if entry is None:
            raise CheckpointError(path, f"lists no {name}: the pipeline is incomplete")
        library = "diffusers" if name in ("unet", "vae") else "transformers"
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] != library or entry[1] not in classes:
            raise CheckpointError(
                path,
                f"its {name} is {reprlib.repr(entry)}; only {library}' {classes[0]} is loaded, a checkpoint's code never run",
            )
    if _listed(index, "image_encoder"):
        raise CheckpointError(path, "it has an image encoder (IP-Adapter), which is not supported")


def _listed(index: Mapping[str, Any], name: str) -> bool:
    """Whether the pipeline has this part; diffusers writes [null, null] for a part that it does not have."""
    entry = index.get(name)
    return isinstance(entry, list) and any(item is not None for item in entry)


def _read_networks(path: Path, root: Path, format: str, notes: list[str]) -> tuple[dict[str, Any], list[Path]]:
    """The networks by name, and the weight files that lie in the checkpoint itself."""
    own = COMPONENTS.get(format)
    networks: dict[str, Any] = {}
    own_files: list[Path] = []
    for name in ("unet", "vae", "text_encoder"):
        folder, prefix = (path, "") if name == own else (root, f"{name}/")
        networks[name], files = _read_network(folder, prefix, name, notes)
        if folder is path:
            own_files += files
    return networks, own_files


def _read_network(folder: Path, prefix: str, name: str, notes: list[str]) -> tuple[Any, list[Path]]:
    config = inside(folder, f"{prefix}config.json")
    if config is None:
        raise CheckpointError(folder / prefix, f"no config.json: the {name} is missing or incomplete")
    names = TEXT_WEIGHT_NAMES if name == "text_encoder" else WEIGHT_NAMES
    tensors, files = read_weights(folder, prefix, names, notes)
    build: dict[str, Callable[..., Any]] = {
        "unet": components.build_unet,
        "vae": components.build_vae,
        "text_encoder": components.build_text_encoder,
    }
    return build[name](read_json(config), tensors, files[0]), files


def _read_scheduler(root: Path, notes: list[str]) -> Any:
    path = inside(root, "scheduler/scheduler_config.json")
    if path is None:
        raise CheckpointError(root / "scheduler", "no scheduler_config.json: the scheduler is missing")
    config = read_json(path)
    # checks the class, and every number that defines the process
    process_from_config(config, path, notes)
    scheduler = getattr(diffusers, config["_class_name"], None)
    if scheduler is None or not hasattr(scheduler, "add_noise"):
        raise CheckpointError(path, f"scheduler {reprlib.repr(config['_class_name'])} is not for text-to-image pipelines")
    with refusing(path, "describes no scheduler"):
        return scheduler.from_config(config)


def _read_tokenizer(root: Path) -> CLIPTokenizer:
    """Load the tokenizer from copies of its files, since options of its config may name any other file."""
    with tempfile.TemporaryDirectory() as copies:
        present = []
        for name in TOKENIZER_FILES:
            path = inside(root, f"tokenizer/{name}")
            if path is None:
                continue
            if path.stat().st_size > MAX_TOKENIZER_BYTES:
                raise CheckpointError(path, f"more than {MAX_TOKENIZER_BYTES} bytes")
            if name.endswith(".json"):
                parse_json(path.read_bytes(), path)
            shutil.copyfile(path, Path(copies, name))
            present.append(name)
        if "tokenizer.json" not in present and not {"vocab.json", "merges.txt"} <= set(present):
            raise CheckpointError(root / "tokenizer", "no tokenizer: tokenizer.json, or vocab.json and merges.txt, expected")
        config = inside(root, "tokenizer/tokenizer_config.json")
        content = read_json(config) if config else {}
        options = {key: content[key] for key in TOKENIZER_OPTIONS if key in content}
        Path(copies, "tokenizer_config.json").write_text(json.dumps(options), encoding="utf-8")
        with refusing(root / "tokenizer", "no CLIP tokenizer"):
            return CLIPTokenizer.from_pretrained(copies, local_files_only=True)


def _check_fit(networks: Mapping[str, Any], tokenizer: CLIPTokenizer, path: Path) -> None:
    """Raise CheckpointError if the sizes of the components do not fit together, as with a wrong base."""
    text, unet, vae = (networks[name].config for name in ("text_encoder", "unet", "vae"))
    if len(tokenizer) > text.vocab_size:
        raise CheckpointError(path, f"a tokenizer of {len(tokenizer)} tokens for a text encoder of {text.vocab_size}")
    if not isinstance(tokenizer.model_max_length, int) or tokenizer.model_max_length < 3:
        raise CheckpointError(path, f"model_max_length must be an integer of at least 3, not {tokenizer.model_max_length!r}")
    if tokenizer.model_max_length > text.max_position_embeddings:
        raise CheckpointError(
            path,
            f"model_max_length {tokenizer.model_max_length} exceeds the encoder's {text.max_position_embeddings} positions",
        )
    if unet.cross_attention_dim != text.hidden_size:
        raise CheckpointError(
            path,
            f"text states of width {text.hidden_size} for a UNet of width {unet.cross_attention_dim}: wrong base?",
        )
    if unet.in_channels != vae.latent_channels:
        raise CheckpointError(path, f"latents of {vae.latent_channels} channels for a UNet of {unet.in_channels}: wrong base?")


def kept_files(source: Path) -> list[str]:
    """Names, relative to the checkpoint folder, of the files that an edited copy keeps.

    Each file lies in the folder, has an allowed size, and contains no code.

    Raises:
        CheckpointError: a listed part is missing, a file lies outside the folder, or a pickle needs more than plain tensors.
    """
    index = inside(source, INDEX)
    content = {} if index is None else read_json(index)
    parts = [""] if index is None else [name for name in content if _listed(content, name)]
    names = [] if index is None else [INDEX]
    for part in parts:
        paths = sorted(part_folder(source, part).iterdir())
        names += [os.path.join(part, path.name) for path in paths if path.suffix in KEPT_SUFFIXES]
    for name in names:
        path = inside(source, name)
        assert path is not None
        weight_size(path)
        if path.suffix in WEIGHT_SUFFIXES:
            containers.keys(path)
    return names


def _config_digest(folders: Iterable[Path]) -> str:
    """SHA-256 of the names and contents of all files that an edited copy keeps, except weights."""
    digest = hashlib.sha256()
    for folder in folders:
        for name in kept_files(folder):
            if not name.endswith(WEIGHT_SUFFIXES):
                digest.update(f"{name} {sha256([folder / name])} ".encode())
    return digest.hexdigest()


def save_pipeline(source: Path, pipeline: Any, changed: str, folder: Path) -> None:
    """Write a copy of the checkpoint `source` with the weights of one module of `pipeline`.

    Every file of the checkpoint keeps its name. All weight files of the changed module are rewritten, including variants and
    shards, each in its own dtype, so that no old weights remain in the folder. All other files are copied.

    Args:
        source: the checkpoint that `load_pipeline` loaded.
        pipeline: the pipeline with the new weights, on any device.
        changed: "unet" or "text_encoder".
        folder: an existing, empty folder.

    Raises:
        CheckpointError: `source` has changed since it was loaded, or lacks `changed` (a UNet alone has no text encoder).
    """
    format = identify(source)
    if COMPONENTS.get(format or "", changed) != changed:
        raise CheckpointError(source, f"a {format} alone: it holds no {changed} to write")
    part = changed if format == PIPELINE else ""
    network = getattr(pipeline, changed)
    weights = network.state_dict()
    for name in kept_files(source):
        (folder / name).parent.mkdir(exist_ok=True)
        if os.path.dirname(name) == part and name.endswith(WEIGHT_SUFFIXES):
            _rewrite(source / name, folder / name, weights, network)
        else:
            shutil.copyfile(source / name, folder / name)


def _rewrite(old: Path, new: Path, weights: Mapping[str, Tensor], network: nn.Module) -> None:
    """Write the tensors of the file `old` with new values, under the same names and in the same dtypes."""
    tensors = dict(_updated(containers.state_dict(containers.load(old), old), weights, network))
    if not any(components.text_name(name, network) in weights or name in weights for name in tensors):
        raise CheckpointError(old, "contains none of the trained weights")
    if old.suffix == ".bin":
        torch.save(tensors, new)
        return
    with safe_open(old, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, new, metadata)


def _updated(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        known = weights.get(name, weights.get(components.text_name(name, network)))
        # a tensor that the module does not have stays, such as the position ids in older files
        yield name, (tensor if known is None else known.detach().to("cpu", tensor.dtype)).clone().contiguous()
