"""Captures the cross-attention maps of a diffusers UNet while it runs, with their gradients.

    with capture(unet, tokens) as maps:          replaces the processors of all cross-attention layers, not of self-attention
        noise = unet(x, t, text).sample
        loss = f(maps.take())                    one map [B,T,M] per layer, with its graph
        loss.backward()                          inside the block, because recomputed layers need the same processors

Under gradient checkpointing (PyTorch's non-reentrant variant, which diffusers uses) a layer runs again in the backward pass.
The maps of its first run stay valid, because their graph takes the recomputed queries and keys from the checkpoint. The maps of
a run inside a backward pass are therefore ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from seal_fast.ops.cross_attention import cross_attention


class CapturedMaps:
    """The cross-attention maps of one UNet's latest forward pass."""

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = tuple(layers)
        self._maps: dict[str, Tensor] = {}

    def put(self, layer: str, maps: Tensor) -> None:
        # a run in the backward pass is a recomputation; only the maps of the forward pass are in the graph
        if not _in_backward():
            self._maps[layer] = maps

    def take(self) -> list[Tensor]:
        """Return and forget the maps [B,T,M] of the latest forward pass, one per layer in `layers`, with their graph.

        Raises:
            RuntimeError: the UNet has not run since the last call, or not all of its layers have.
        """
        missing = [layer for layer in self.layers if layer not in self._maps]
        if missing:
            raise RuntimeError(f"no maps of {', '.join(missing)}: run the UNet once before each take()")
        maps = [self._maps[layer] for layer in self.layers]
        self._maps.clear()
        return maps


def _in_backward() -> bool:
    """Whether a backward pass runs this code, by the test of torch.utils.checkpoint. It never runs a compiled forward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _CapturingProcessor:
    """Attention of one layer by the fused op. It computes logits and maps in float32, so `upcast_attention` needs no code."""

    def __init__(self, layer: str, tokens: Tensor | None, maps: CapturedMaps) -> None:
        self.layer, self.tokens, self.maps = layer, tokens, maps

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if attention_mask is not None:
            raise ValueError("maps cannot be captured under an attention mask: call the UNet without encoder_attention_mask")
        assert encoder_hidden_states is not None
        if attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        q, k, v = (
            projected.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for projected in (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        )
        out, maps = cross_attention(q, k, v, self.tokens, attn.scale)
        self.maps.put(self.layer, maps)
        joined: Tensor = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        return joined / attn.rescale_output_factor


def cross_attention_layers(unet: nn.Module) -> dict[str, Attention]:
    """The cross-attention layers of a UNet by name, in the order of its modules.

    Raises:
        ValueError: the UNet has no such layer, or one that differs from those of Stable Diffusion 1, 2 and XL.
    """
    layers = {
        name: module for name, module in unet.named_modules() if isinstance(module, Attention) and module.is_cross_attention
    }
    if not layers:
        raise ValueError("the UNet has no cross-attention layers: is it a text-to-image model?")
    for name, layer in layers.items():
        extras = (layer.group_norm, layer.spatial_norm, layer.norm_q, layer.norm_k, layer.added_kv_proj_dim)
        if any(extra is not None for extra in extras) or layer.residual_connection:
            raise ValueError(f"cross-attention layer {name} is not like those of Stable Diffusion 1, 2 and XL")
    return layers


@contextmanager
def capture(unet: nn.Module, tokens: Tensor | None = None) -> Iterator[CapturedMaps]:
    """Capture the maps of the UNet's cross-attention layers. At the end, also after an error, it gets its own processors back.

    torch.compile compiles such a UNet to one graph; under gradient checkpointing it breaks the graph at every checkpoint.

    Args:
        unet: a diffusers UNet2DConditionModel of Stable Diffusion 1, 2 or XL, in any precision, with or without LoRA layers.
        tokens: int64 [T] on the UNet's device: positions in the prompt whose maps are captured; None for all.

    Yields:
        The maps: softmax probabilities averaged over heads, float32 [B,T,M], for the M places of the layer's image, row by row.

    Raises:
        ValueError: see `cross_attention_layers`.
    """
    layers = cross_attention_layers(unet)
    before = {name: layer.processor for name, layer in layers.items()}
    maps = CapturedMaps(list(layers))
    try:
        for name, layer in layers.items():
            layer.set_processor(_CapturingProcessor(name, tokens, maps))  # type: ignore[arg-type]
        yield maps
    finally:
        for name, layer in layers.items():
            layer.set_processor(before[name])


def as_images(maps: Tensor, latent_size: tuple[int, int]) -> Tensor:
    """Maps [B,T,M] of a layer as images [B,T,h,w]. A layer's image is the latent, halved (rounding up) some number of times.

    Raises:
        ValueError: M does not fit any halving of the latent.
    """
    height, width = latent_size
    while height * width > maps.shape[2]:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != maps.shape[2]:
        raise ValueError(f"maps of {maps.shape[2]} places do not come from a latent of {latent_size[0]} x {latent_size[1]}")
    return maps.unflatten(2, (height, width))


def aggregate(maps: Sequence[Tensor], latent_size: tuple[int, int]) -> Tensor:
    """Mean over layers of maps [B,T,M], each resized bilinearly to the latent's size: [B,T,H,W], differentiable."""
    resized = [F.interpolate(as_images(m, latent_size), latent_size, mode="bilinear", align_corners=False) for m in maps]
    return torch.stack(resized).mean(0)
