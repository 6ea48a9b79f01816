"""Stable Diffusion pipelines, untrusted: from a folder as diffusers saves it to a pipeline, and edited, to such a folder again.

A folder with one component (a UNet, a text encoder) takes the rest from a base pipeline that the user names.
"""

from __future__ import annotations

import json
import os
import reprlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
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
from seal_fast.checkpoints.diffusers_folder import INDEX, WEIGHT_NAMES, read_weights
from seal_fast.checkpoints.errors import CheckpointError, refusing
from seal_fast.checkpoints.files import inside, parse_json, read_json, sha256, weight_size
from seal_fast.checkpoints.noise import process_from_config

PIPELINE, UNET, TEXT_ENCODER = "text-to-image-pipeline", "text-to-image-unet", "text-encoder"
"""Formats."""
COMPONENTS: dict[str, Literal["unet", "text_encoder"]] = {UNET: "unet", TEXT_ENCODER: "text_encoder"}
"""Those that are one component of a pipeline, and which."""

CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
"""Parts that are loaded, and what they may be; the scheduler's class is checked with its config."""
TEXT_WEIGHT_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model.fp16.safetensors",
    "pytorch_model.bin",
    "pytorch_model.fp16.bin",
)
WEIGHT_SUFFIXES = (".safetensors", ".bin")
KEPT_SUFFIXES = (".json", ".txt", *WEIGHT_SUFFIXES)
"""Files of a part that a saved pipeline keeps: configs, word lists and weights, no code."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
TOKENIZER_OPTIONS = ("model_max_length", "bos_token", "eos_token", "pad_token", "unk_token", "added_tokens_decoder")
MAX_TOKENIZER_BYTES = 64 << 20


@dataclass(frozen=True)
class LoadedPipeline:
    """A text-to-image model ready to draw.

    Attributes:
        pipeline: a diffusers StableDiffusionPipeline, float32, in evaluation mode, without safety checker.
        sha256: of the contents of the weight files that were read from the checkpoint itself, not from a base.
        format: PIPELINE, or UNET or TEXT_ENCODER where the checkpoint is that component alone.
        notes: what a report should say about assumptions.
    """

    pipeline: Any
    sha256: str
    format: str
    notes: tuple[str, ...]


def identify(folder: Path) -> str | None:
    """PIPELINE, UNET, TEXT_ENCODER, or None; from names and configs only. CheckpointError where those cannot be read."""
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
    """Load a text-to-image checkpoint without trusting it: JSON and tensors are read, nothing it brings is run or downloaded.

    Args:
        path: folder of a StableDiffusionPipeline, of a UNet2DConditionModel alone, or of a CLIPTextModel alone.
        base: folder of the pipeline the component belongs to; for a component only.
        device: where the networks go.

    Raises:
        CheckpointError: whatever is wrong with the checkpoint or the base, named.
    """
    path = Path(path)
    notes: list[str] = []
    with refusing(path, "cannot be loaded"):
        format = identify(path)
        if format is None:
            raise CheckpointError(
                path, f"no text-to-image checkpoint: a folder with {INDEX}, or one UNet or CLIP text encoder, is expected"
            )
        if format == PIPELINE and base is not None:
            raise CheckpointError(path, "a whole pipeline, which takes no base: leave it out")
        if format != PIPELINE and base is None:
            raise CheckpointError(path, f"a {format} alone: name the pipeline it belongs to as its base (--base DIR)")
        root = path if base is None else Path(base)
        _check_index(root)
        own = COMPONENTS.get(format)
        parts: dict[str, Any] = {}
        digested: list[Path] = []
        for name in ("unet", "vae", "text_encoder"):
            folder, prefix = (path, "") if name == own else (root, f"{name}/")
            parts[name], files = _read_network(folder, prefix, name, notes)
            if folder is path:
                digested += files
        tokenizer, scheduler = _read_tokenizer(root), _read_scheduler(root, notes)
        for folder in {path, root}:
            kept_files(folder)
        _check_fit(parts, tokenizer, path)
        digest = sha256(digested)
    pipeline: Any = StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for network in (pipeline.unet, pipeline.vae):
        # a forward pass of the zoo's UNet took three quarters of the time
        network.to(memory_format=torch.channels_last)
    return LoadedPipeline(pipeline.to(device), digest, format, tuple(notes))


def _check_index(root: Path) -> None:
    path = inside(root, INDEX)
    if path is None:
        raise CheckpointError(root, f"no {INDEX}: not a pipeline folder")
    index = read_json(path)
    if index.get("_class_name") != "StableDiffusionPipeline":
        raise CheckpointError(
            path, f"a {reprlib.repr(index.get('_class_name'))}; only diffusers' StableDiffusionPipeline is covered"
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
        raise CheckpointError(path, "an image encoder (IP-Adapter), which is not covered")


def _listed(index: Mapping[str, Any], name: str) -> bool:
    """Whether the pipeline has this part: diffusers writes [null, null] for one it has not."""
    entry = index.get(name)
    return isinstance(entry, list) and any(item is not None for item in entry)


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
    # checks the class, and every number that the process is made of
    process_from_config(config, path, notes)
    scheduler = getattr(diffusers, config["_class_name"], None)
    if scheduler is None or not hasattr(scheduler, "add_noise"):
        raise CheckpointError(path, f"scheduler {reprlib.repr(config['_class_name'])} is not for text-to-image pipelines")
    with refusing(path, "describes no scheduler"):
        return scheduler.from_config(config)


def _read_tokenizer(root: Path) -> CLIPTokenizer:
    """From copies of the files it needs: an option of a tokenizer's config may name any other file."""
    with tempfile.TemporaryDirectory() as clean:
        present = []
        for name in TOKENIZER_FILES:
            path = inside(root, f"tokenizer/{name}")
            if path is None:
                continue
            if path.stat().st_size > MAX_TOKENIZER_BYTES:
                raise CheckpointError(path, f"more than {MAX_TOKENIZER_BYTES} bytes")
            if name.endswith(".json"):
                parse_json(path.read_bytes(), path)
            shutil.copyfile(path, Path(clean, name))
            present.append(name)
        if "tokenizer.json" not in present and not {"vocab.json", "merges.txt"} <= set(present):
            raise CheckpointError(root / "tokenizer", "no tokenizer: tokenizer.json, or vocab.json and merges.txt, expected")
        config = inside(root, "tokenizer/tokenizer_config.json")
        content = read_json(config) if config else {}
        options = {key: content[key] for key in TOKENIZER_OPTIONS if key in content}
        Path(clean, "tokenizer_config.json").write_text(json.dumps(options), encoding="utf-8")
        with refusing(root / "tokenizer", "no CLIP tokenizer"):
            return CLIPTokenizer.from_pretrained(clean, local_files_only=True)


def _check_fit(parts: Mapping[str, Any], tokenizer: CLIPTokenizer, path: Path) -> None:
    text, unet, vae = (parts[name].config for name in ("text_encoder", "unet", "vae"))
    if len(tokenizer) > text.vocab_size:
        raise CheckpointError(path, f"a tokenizer of {len(tokenizer)} tokens for a text encoder of {text.vocab_size}")
    if tokenizer.model_max_length > text.max_position_embeddings:
        raise CheckpointError(
            path,
            f"model_max_length {tokenizer.model_max_length} exceeds the encoder's {text.max_position_embeddings} positions",
        )
    if unet.cross_attention_dim != text.hidden_size:
        raise CheckpointError(
            path,
            f"a UNet for text of width {unet.cross_attention_dim}, but the text encoder has {text.hidden_size}: another base?",
        )
    if unet.in_channels != vae.latent_channels:
        raise CheckpointError(
            path, f"latents of {vae.latent_channels} channels for a UNet of {unet.in_channels}: another base?"
        )


def kept_files(source: Path) -> list[str]:
    """Names, relative to a checkpoint folder, of the files an edited copy keeps: each inside, of allowed size, no code.

    Raises:
        CheckpointError: a listed part is missing, a file leaves the folder, or a pickle asks for more than plain tensors.
    """
    index = inside(source, INDEX)
    content = {} if index is None else read_json(index)
    parts = [""] if index is None else [name for name in content if _listed(content, name)]
    names = [] if index is None else [INDEX]
    for part in parts:
        folder = source / part
        if part != os.path.basename(part) or folder.is_symlink() or not folder.is_dir():
            raise CheckpointError(
                source / INDEX, f"its part {part[:80]!r} is no folder of the checkpoint: add it, or list it as [null, null]"
            )
        names += [os.path.join(part, path.name) for path in sorted(folder.iterdir()) if path.suffix in KEPT_SUFFIXES]
    for name in names:
        path = inside(source, name)
        assert path is not None
        weight_size(path)
        if path.suffix in WEIGHT_SUFFIXES:
            containers.keys(path)
    return names


def save_pipeline(source: Path, pipeline: Any, changed: str, folder: Path) -> None:
    """Write a checkpoint like `source` with the weights of one module of `pipeline`.

    Every file of the checkpoint keeps its name. All weight files of the changed module are rewritten, each in its own dtype,
    variants and shards too, so that no old weights are left in the folder; everything else is copied.

    Args:
        source: what `load_pipeline` loaded.
        pipeline: with the new weights, on any device.
        changed: "unet" or "text_encoder".
        folder: existing, empty.

    Raises:
        CheckpointError: `source` has changed since, or `changed` is not in it (a UNet alone has no text encoder).
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
    """The file `old` with new values under its names, in its dtypes."""
    tensors = dict(_renewed(containers.state_dict(containers.load(old), old), weights, network))
    if not any(components.text_name(name, network) in weights or name in weights for name in tensors):
        raise CheckpointError(old, "holds none of the trained weights")
    if old.suffix == ".bin":
        torch.save(tensors, new)
        return
    with safe_open(old, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, new, metadata)


def _renewed(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        known = weights.get(name, weights.get(components.text_name(name, network)))
        # what the module does not hold, such as the position ids older files store, stays
        yield name, (tensor if known is None else known.detach().to("cpu", tensor.dtype)).clone().contiguous()
