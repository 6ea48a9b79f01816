"""Build diffusers' UNet2DModel from an untrusted config and tensors.

Every value is checked first. Names and shapes are compared on the meta device, and then the network is filled.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from seal_fast.checkpoints.checks import FLAG, NOTHING, SIZE, WIDTH, Check, either, integer, list_of, number, one_of
from seal_fast.checkpoints.errors import CheckpointError, refusing

ATTENTION_SIZE = 16
"""Side of the feature map at which DDPM's UNets have attention (Ho et al. 2020, appendix B)."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D")

CONFIG_CHECKS: dict[str, Check] = {
    "sample_size": either(SIZE, lambda value: list_of(SIZE)(value) and len(value) == 2),
    "in_channels": integer(1, 64),
    "out_channels": integer(1, 64),
    "center_input_sample": FLAG,
    "time_embedding_type": one_of("positional", "fourier", "learned"),
    "time_embedding_dim": either(NOTHING, integer(1, 65536)),
    "freq_shift": number(0, 1),
    "flip_sin_to_cos": FLAG,
    "down_block_types": list_of(one_of(*DOWN_BLOCKS)),
    "mid_block_type": one_of("UNetMidBlock2D", None),
    "up_block_types": list_of(one_of(*UP_BLOCKS)),
    "block_out_channels": list_of(WIDTH),
    "layers_per_block": integer(1, 32),
    "mid_block_scale_factor": number(1e-3, 1e3),
    "downsample_padding": integer(0, 1),
    "downsample_type": one_of("conv", "resnet"),
    "upsample_type": one_of("conv", "resnet"),
    "dropout": number(0, 1),
    "act_fn": one_of("silu", "swish", "mish", "gelu", "relu"),
    "attention_head_dim": either(NOTHING, WIDTH),
    "norm_num_groups": either(NOTHING, WIDTH),
    "attn_norm_num_groups": either(NOTHING, WIDTH),
    "norm_eps": number(1e-12, 1),
    "resnet_time_scale_shift": one_of("default", "scale_shift"),
    "add_attention": FLAG,
    "class_embed_type": NOTHING,
    "num_class_embeds": NOTHING,
    "num_train_timesteps": either(NOTHING, integer(1, 100_000)),
}
"""Keys of a UNet config that are read, with the check of their values. All other keys are ignored."""


def checked_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The arguments of UNet2DModel in an untrusted config.

    Raises:
        CheckpointError: another class, a value out of bounds, class conditioning, no image size, or an image size that cannot
            be halved once per level.
    """
    class_name = config.get("_class_name", "UNet2DModel")
    if class_name == "UNet2DConditionModel":
        raise CheckpointError(path, "the UNet of a text-to-image pipeline, which the search for noise triggers does not cover")
    if class_name != "UNet2DModel":
        raise CheckpointError(path, f"class {reprlib.repr(class_name)}, but only diffusers' UNet2DModel is supported")
    arguments = {key: config[key] for key in CONFIG_CHECKS if key in config}
    for key in ("class_embed_type", "num_class_embeds"):
        if arguments.get(key) is not None:
            raise CheckpointError(
                path, f"a class-conditional UNet ({key} is set), which the search for noise triggers does not cover"
            )
    if arguments.get("sample_size") is None:
        raise CheckpointError(path, "sample_size is missing, so the image size is unknown; add it to the config")
    for key, value in arguments.items():
        if not CONFIG_CHECKS[key](value):
            raise CheckpointError(path, f"{key} = {reprlib.repr(value)} is not supported")
    if arguments.get("in_channels", 3) != arguments.get("out_channels", 3):
        raise CheckpointError(path, "in_channels and out_channels differ: a network that learns its variance is not supported")
    factor = 2 ** (len(arguments.get("block_out_channels", "four")) - 1)
    if any(side % factor for side in image_shape(arguments)[1:]):
        raise CheckpointError(
            path, f"sample_size {arguments['sample_size']} is not a multiple of {factor}, as its levels require"
        )
    with refusing(path, "describes no UNet2DModel"):
        _skeleton(arguments)
    return arguments


def image_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of the data of a network with this checked config."""
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return config.get("in_channels", 3), height, width


def modern_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the attention tensors of diffusers before 0.15 (query, key, value, proj_attn) to their present names."""
    present = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

    def rename(match: re.Match[str]) -> str:
        return f"{match[1]}.{present[match[2]]}."

    return {re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", rename, k): v for k, v in tensors.items()}


def looks_like(names: Iterable[str]) -> bool:
    """Whether the tensor names are those of an unconditional diffusers UNet."""
    names = frozenset(names)
    conditional = any(".attn2." in name for name in names)
    return "time_embedding.linear_1.weight" in names and "down_blocks.0.resnets.0.conv1.weight" in names and not conditional


def inferred_config(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Infer the config of a DDPM UNet (such as google/ddpm-cifar10-32) from the shapes of its tensors, under diffusers' names.

    The image size follows from the level with attention, which DDPM has at 16 x 16.

    Raises:
        CheckpointError: another architecture, or not exactly one level with attention.
    """
    if "time_proj.weight" in tensors or not looks_like(tensors):
        raise CheckpointError(
            path, "no config, and not a plain DDPM UNet, so its architecture cannot be inferred; add its config.json"
        )
    with refusing(path, "no config, and the shapes of its tensors are not those of a UNet"):
        levels = _count(tensors, "down_blocks.{}.resnets.0.conv1.weight")
        attention = [f"down_blocks.{i}.attentions.0.to_q.weight" in tensors for i in range(levels)]
        if sum(attention) != 1:
            raise CheckpointError(
                path,
                f"no config, and {sum(attention)} levels with attention: the image size needs exactly one; add a config.json",
            )
        config = {
            "sample_size": ATTENTION_SIZE << attention.index(True),
            "in_channels": tensors["conv_in.weight"].shape[1],
            "out_channels": tensors["conv_out.weight"].shape[0],
            "block_out_channels": [tensors[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)],
            "layers_per_block": _count(tensors, "down_blocks.0.resnets.{}.conv1.weight"),
            "time_embedding_dim": tensors["time_embedding.linear_1.weight"].shape[0],
            "down_block_types": ["AttnDownBlock2D" if here else "DownBlock2D" for here in attention],
            "up_block_types": ["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)],
            "attention_head_dim": None,
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "norm_num_groups": 32,
            "norm_eps": 1e-6,
        }
    return checked_config(config, path)


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    index = 0
    while pattern.format(index) in tensors:
        index += 1
    return index


def _skeleton(config: Mapping[str, Any]) -> Any:
    with torch.device("meta"):
        return UNet2DModel(**config)


def build(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> nn.Module:
    """Build the UNet of a checked config with these tensors as float32; for errors see `fill`."""
    return fill(_skeleton(config), tensors, path)


def fill(network: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> nn.Module:
    """Fill a network that was built on the meta device with these tensors as float32.

    Nothing is allocated before all names and shapes agree.

    Raises:
        CheckpointError: missing, unexpected or misshapen tensors, a dtype that is no plain float, NaN or infinity.
    """
    expected = network.state_dict()
    for what, names in (
        ("missing", expected.keys() - tensors.keys()),
        ("unexpected", tensors.keys() - expected.keys()),
        ("misshapen", {n for n in expected.keys() & tensors.keys() if expected[n].shape != tensors[n].shape}),
    ):
        if names:
            shown = ", ".join(name[:80] for name in sorted(names)[:3])
            raise CheckpointError(path, f"{len(names)} tensors {what}, such as {shown}")
    weights = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise CheckpointError(path, f"tensor {name} is {tensor.dtype}, not a plain float")
        # a copy: a tensor mapped from the file would change, or crash the process, with the file
        weights[name] = tensor.to(torch.float32, copy=True).contiguous()
        if not bool(weights[name].isfinite().all()):
            raise CheckpointError(path, f"tensor {name} holds NaN or infinity")
    network.load_state_dict(weights, assign=True)
    if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
        raise CheckpointError(path, "the network has parameters or buffers without a tensor in the file")
    return network
