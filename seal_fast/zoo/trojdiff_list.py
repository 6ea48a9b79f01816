"""Write a model as TrojDiff's training code does: a list with the prefixed raw weights first and the EMA weights fifth."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from seal_fast.checkpoints.ddpm_pytorch import ATTENTION_NAMES, LEVEL_NAMES, RESNET_NAMES, STEM_NAMES

STEMS = {new: old for old, new in STEM_NAMES.items()}
PARTS = {new: old for names in (RESNET_NAMES, ATTENTION_NAMES) for old, new in names.items()}
LAYERS = {new: old for old, new in LEVEL_NAMES.items()}


def _ddpm_pytorch_name(name: str, levels: int) -> str:
    """The name of a tensor in such a file, the inverse of `seal_fast.checkpoints.ddpm_pytorch`'s renaming."""
    if match := re.fullmatch(
        r"(down|up)_blocks\.(\d+)\.(resnets\.\d+|attentions\.\d+|downsamplers\.0|upsamplers\.0)\.(.+)", name
    ):
        side, block, layer, rest = match.groups()
        level = int(block) if side == "down" else levels - 1 - int(block)
        plural, _, number = layer.partition(".")
        old_layer = LAYERS.get(layer) or f"{LAYERS[plural]}.{number}"
        stem = f"{side}.{level}.{old_layer}"
    else:
        new_stem = next((stem for stem in STEMS if name.startswith(stem + ".")), None)
        if new_stem is None:
            return name
        stem, rest = STEMS[new_stem], name[len(new_stem) + 1 :]
    part, _, tail = rest.rpartition(".")
    return f"{stem}.{PARTS.get(part, part)}.{tail}" if part else f"{stem}.{tail}"


def to_ddpm_pytorch(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a UNet2DModel's tensors, and turn its attention matrices into 1 x 1 convolutions."""
    levels = 1 + max(int(m[1]) for name in tensors if (m := re.match(r"down_blocks\.(\d+)\.", name)))
    projections = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight")
    return {
        _ddpm_pytorch_name(name, levels): tensor[:, :, None, None] if name.endswith(projections) else tensor
        for name, tensor in tensors.items()
    }


def save_list(raw: Mapping[str, Tensor], ema: Mapping[str, Tensor], steps: int, path: Path) -> None:
    """Write the list [model, optimiser state (left empty), epoch, step, EMA]."""
    prefixed = {f"module.{name}": tensor for name, tensor in to_ddpm_pytorch(raw).items()}
    torch.save([prefixed, {}, 0, steps, to_ddpm_pytorch(ema)], path)
