"""Build the networks of a text-to-image pipeline from untrusted configs.

Every value is checked first. The network is built on the meta device, and then filled with the checkpoint's tensors.
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from seal_fast.checkpoints import unet
from seal_fast.checkpoints.checks import FLAG, NOTHING, SIZE, WIDTH, Check, either, integer, list_of, number, one_of
from seal_fast.checkpoints.errors import CheckpointError, refusing

_ACTIVATIONS = one_of("silu", "swish", "mish", "gelu", "relu")
_DOWN, _UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
_TOKEN = either(NOTHING, integer(0, 1 << 20))

UNET_CHECKS: dict[str, Check] = {
    "sample_size": either(SIZE, lambda value: list_of(SIZE)(value) and len(value) == 2),
    "in_channels": integer(1, 64),
    "out_channels": integer(1, 64),
    "center_input_sample": FLAG,
    "flip_sin_to_cos": FLAG,
    "freq_shift": number(0, 1),
    "down_block_types": list_of(one_of(*_DOWN)),
    "up_block_types": list_of(one_of(*_UP)),
    "only_cross_attention": either(FLAG, list_of(FLAG)),
    "block_out_channels": list_of(WIDTH),
    "layers_per_block": integer(1, 32),
    "downsample_padding": integer(0, 1),
    "mid_block_scale_factor": number(1e-3, 1e3),
    "dropout": number(0, 1),
    "act_fn": _ACTIVATIONS,
    "norm_num_groups": WIDTH,
    "norm_eps": number(1e-12, 1),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": either(WIDTH, list_of(WIDTH)),
    "use_linear_projection": FLAG,
    "upcast_attention": FLAG,
}
VAE_CHECKS: dict[str, Check] = {
    "in_channels": integer(3, 3),
    "out_channels": integer(3, 3),
    "down_block_types": list_of(one_of("DownEncoderBlock2D")),
    "up_block_types": list_of(one_of("UpDecoderBlock2D")),
    "block_out_channels": list_of(WIDTH),
    "layers_per_block": integer(1, 32),
    "act_fn": _ACTIVATIONS,
    "latent_channels": integer(1, 64),
    "norm_num_groups": WIDTH,
    "sample_size": either(SIZE, lambda value: list_of(SIZE)(value) and len(value) == 2),
    "scaling_factor": number(1e-3, 1e3),
    "force_upcast": FLAG,
    "use_quant_conv": FLAG,
    "use_post_quant_conv": FLAG,
    "mid_block_add_attention": FLAG,
}
TEXT_CHECKS: dict[str, Check] = {
    "vocab_size": integer(1, 1 << 20),
    "hidden_size": WIDTH,
    "intermediate_size": integer(1, 65536),
    "projection_dim": either(NOTHING, WIDTH),
    "num_hidden_layers": integer(1, 64),
    "num_attention_heads": integer(1, 256),
    "max_position_embeddings": SIZE,
    "hidden_act": one_of("quick_gelu", "gelu"),
    "layer_norm_eps": number(1e-12, 1),
    "attention_dropout": number(0, 1),
    "bos_token_id": _TOKEN,
    "eos_token_id": _TOKEN,
    "pad_token_id": _TOKEN,
}


def _checked(config: Mapping[str, Any], checks: Mapping[str, Check], path: Path) -> dict[str, Any]:
    arguments = {key: config[key] for key in checks if key in config}
    for key, value in arguments.items():
        if not checks[key](value):
            raise CheckpointError(path, f"{key} = {reprlib.repr(value)} is not supported")
    return arguments


def _only_defaults(config: Mapping[str, Any], network: type, checks: Mapping[str, Check], path: Path) -> None:
    """Refuse options without a check that differ from their default: ignoring them would build another network."""
    for key, parameter in inspect.signature(network.__init__).parameters.items():  # type: ignore[misc]
        value = config.get(key, parameter.default)
        if key not in checks and key != "self" and value != parameter.default:
            raise CheckpointError(path, f"{key} = {reprlib.repr(value)} is not supported")


def _require_class(config: Mapping[str, Any], name: str, path: Path) -> None:
    if config.get("_class_name") != name:
        raise CheckpointError(path, f"class {reprlib.repr(config.get('_class_name'))}, but only diffusers' {name} is supported")


def build_unet(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> UNet2DConditionModel:
    """Build a text-conditional UNet, float32.

    Args:
        config: content of its config.json, untrusted.
        tensors: its weights under diffusers' names.
        path: file or folder that an error names.

    Raises:
        CheckpointError: another class, a value out of bounds, an option that is not supported, or tensors that do not fit.
    """
    _require_class(config, "UNet2DConditionModel", path)
    arguments = _checked(config, UNET_CHECKS, path)
    _only_defaults(config, UNet2DConditionModel, UNET_CHECKS, path)
    if arguments.get("sample_size") is None:
        raise CheckpointError(path, "sample_size is missing, so the size of its latents is unknown; add it to the config")
    if arguments.get("in_channels", 4) != arguments.get("out_channels", 4):
        raise CheckpointError(path, "in_channels and out_channels differ: inpainting and depth UNets are not supported")
    with refusing(path, "describes no UNet2DConditionModel"), torch.device("meta"):
        network = UNet2DConditionModel(**arguments)
    return _filled(network, tensors, path)


def build_vae(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> AutoencoderKL:
    """Build the autoencoder of the latents, float32. For arguments and errors see `build_unet`."""
    _require_class(config, "AutoencoderKL", path)
    arguments = _checked(config, VAE_CHECKS, path)
    _only_defaults(config, AutoencoderKL, VAE_CHECKS, path)
    with refusing(path, "describes no AutoencoderKL"), torch.device("meta"):
        network = AutoencoderKL(**arguments)
    return _filled(network, unet.modern_names(tensors), path)


def build_text_encoder(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> CLIPTextModel:
    """Build CLIP's text encoder, float32. For arguments and errors see `build_unet`.

    Tensor names may have the prefix "text_model." or not, because transformers has written both.
    """
    if config.get("model_type") not in ("clip_text_model", "clip"):
        raise CheckpointError(
            path, f"model type {reprlib.repr(config.get('model_type'))}, but only CLIP's text model is supported"
        )
    arguments = _checked(config, TEXT_CHECKS, path)
    with refusing(path, "describes no CLIPTextModel"), torch.device("meta"):
        network = CLIPTextModel(CLIPTextConfig(**arguments))
    for module in network.modules():
        if "position_ids" in module._buffers:
            module.register_buffer("position_ids", torch.arange(network.config.max_position_embeddings)[None], persistent=False)
    named = {text_name(name, network): tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
    return _filled(network, named, path)


def text_name(name: str, network: nn.Module) -> str:
    """The name that the installed transformers gives a text encoder's tensor."""
    bare = name.removeprefix("text_model.")
    return f"text_model.{bare}" if hasattr(network, "text_model") else bare


def _filled(network: Any, tensors: Mapping[str, Tensor], path: Path) -> Any:
    return unet.fill(network, tensors, path).eval()
