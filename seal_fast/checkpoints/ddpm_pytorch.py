"""TrojDiff checkpoints: rename the tensors of the DDPM UNet in PyTorch that TrojDiff builds on to diffusers' UNet2DModel.

Both networks compute the same function.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from seal_fast.checkpoints.containers import state_dict
from seal_fast.checkpoints.errors import CheckpointError

EMA_INDEX = 4
"""Index of the EMA weights in the list [model, optimiser, epoch, step, EMA] that the training code saves."""

STEM_NAMES = {
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
    "mid.block_1": "mid_block.resnets.0",
    "mid.attn_1": "mid_block.attentions.0",
    "mid.block_2": "mid_block.resnets.1",
    "norm_out": "conv_norm_out",
}
RESNET_NAMES = {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"}
ATTENTION_NAMES = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
LEVEL_NAMES = {"block": "resnets", "attn": "attentions", "downsample": "downsamplers.0", "upsample": "upsamplers.0"}


def looks_like(names: Iterable[str]) -> bool:
    """Whether the tensor names, with or without the prefix "module.", are those of this UNet."""
    return any(name.removeprefix("module.") == "temb.dense.0.weight" for name in names)


def chosen_weights(value: Any, weights: str, path: Path, notes: list[str]) -> dict[str, Tensor]:
    """Choose a state dict of a loaded file: a bare state dict, or the EMA or raw weights of a training list.

    The attack samples with EMA weights, and raw weights may not contain the backdoor. "ema" therefore falls back to raw weights
    only if the list has no EMA weights, and adds a note about it.
    """
    if not isinstance(value, list | tuple):
        return state_dict(value, path)
    raw = value[0] if value and isinstance(value[0], dict) and value[0] else None
    ema = value[EMA_INDEX] if len(value) > EMA_INDEX and isinstance(value[EMA_INDEX], dict) and value[EMA_INDEX] else None
    if weights == "raw":
        notes.append("raw weights used" + ("; the file also holds EMA weights" if ema is not None else ""))
        return state_dict(raw, path)
    if ema is None:
        notes.append("no EMA weights in the file: raw weights used")
        return state_dict(raw, path)
    notes.append("EMA weights used" + ("; the file also holds raw weights" if raw is not None else ""))
    return state_dict(ema, path)


def to_diffusers(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Rename the tensors, and turn the 1 x 1 convolutions of attention into matrices.

    The levels of the upward path are numbered from the finest here, and from the coarsest in diffusers.
    """
    plain = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    levels = 1 + max((int(m[1]) for name in plain if (m := re.match(r"down\.(\d{1,2})\.", name))), default=-1)
    renamed: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        new = _rename(name, levels)
        is_projection = ".attentions." in new and ".group_norm." not in new
        if is_projection and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]
        if new in renamed:
            raise CheckpointError(path, f"two tensors for {new[:80]}")
        renamed[new] = tensor
    return renamed


def _rename(name: str, levels: int) -> str:
    """diffusers' name of a tensor. A name that fits no pattern stays, and `unet.fill` then reports it as unexpected."""
    if match := re.fullmatch(r"(down|up)\.(\d{1,2})\.(block|attn|downsample|upsample)\.(.+)", name):
        side, level, layer, rest = match.groups()
        index = int(level) if side == "down" else levels - 1 - int(level)
        stem = f"{side}_blocks.{index}.{LEVEL_NAMES[layer]}"
        if layer in ("block", "attn"):
            number, _, rest = rest.partition(".")
            stem = f"{stem}.{number}"
    else:
        found = next((old for old in STEM_NAMES if name.startswith(old + ".")), None)
        if found is None:
            return name
        stem, rest = STEM_NAMES[found], name[len(found) + 1 :]
    part, dot, tail = rest.partition(".")
    inner = ATTENTION_NAMES if ".attentions." in stem else RESNET_NAMES
    return f"{stem}.{inner.get(part, part)}{dot}{tail}"
