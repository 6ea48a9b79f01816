"""A frozen denoiser as fast as this processor runs it: the same network, its parts exchanged for equivalents.

    convolutions   keep nothing of their input for the gradient, since the weights need none; laid out channels-last, once.
                   Those of 3 x 3 do a quarter of the products (`seal_fast.ops.winograd_convolution`)
    weights        converted to the precision of the run once, where autocast would do it in every pass; but those of the
                   timestep stay in float32: a bfloat16 product of so few numbers takes longer
    blocks         are one node of autograd's graph; normalisation and activation are one op (`seal_fast.ops.group_norm_silu`),
                   which adds the timestep as well
    upsampling     keeps the layout of many images too, which diffusers changes for the sake of a kernel of GPUs
    attention      has its softmax in float32: the gradient of torch's bfloat16 kernel costs fifteen times as much

torch.compile adds nothing to it (0.97 of the speed on AVX2, after two minutes of compiling). What is not understood stays as
it is. All of this was measured on CPUs only, so other devices keep their network.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, interpolate, scaled_dot_product_attention, silu

from seal_fast.diffusion.denoiser import Denoiser
from seal_fast.ops import WinogradWeight, group_norm_silu
from seal_fast.ops.group_norm_silu import group_norm_silu_backward_op, group_norm_silu_op
from seal_fast.ops.winograd_convolution import winograd_convolution_op

_OF_THE_TIMESTEP = ("time_embedding", "time_emb_proj")
"""Of UNet2DModel, and of its blocks."""


def _exactly(part: Any, kind: Any) -> bool:
    """A subclass may compute something else."""
    return type(part) is kind


class _FrozenConvolution(torch.autograd.Function):
    """Keeps the size of its input, where torch would keep the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, conv: _Convolution) -> Tensor:
        ctx.size, ctx.conv = x.shape, conv
        return conv.of(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.conv.input_gradient(grad, ctx.size), None


class _Convolution(nn.Module):
    """nn.Conv2d with zero padding."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.geometry: tuple[Any, ...] = conv.stride, conv.padding, conv.dilation, conv.groups
        weight = conv.weight.to(dtype, memory_format=torch.channels_last)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.to(dtype), requires_grad=False)

    def taken(self, x: Tensor) -> Tensor:
        """x in the precision of the run and the layout of the weight."""
        return x.to(self.dtype, memory_format=torch.channels_last)

    def of(self, x: Tensor) -> Tensor:
        """What comes of an x that is `taken`."""
        return conv2d(x, self.weight, self.bias, *self.geometry)

    def input_gradient(self, grad: Tensor, size: torch.Size) -> Tensor:
        """The gradient of an x of a size for that of what came of it."""
        # of the input only its size and layout matter
        x = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
        *sides, groups = self.geometry
        return torch.ops.aten.convolution_backward(
            grad, x, self.weight, None, *sides, False, (0, 0), groups, (True, False, False)
        )[0]

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenConvolution.apply(self.taken(x), self)


class _Winograd(_Convolution):
    """One of 3 x 3, stride 1 and padding 1, which calculates in float32 whatever it is given.

    Gradient included it was 1.3 (16 channels) to 2.5 times as fast as oneDNN in float32 on AVX2; on AVX-512 a pass of a network
    for 16 px under bfloat16, 64 images forth and back with one thread, took .89 of its time with oneDNN's bfloat16.
    """

    @staticmethod
    def replaces(conv: nn.Conv2d) -> bool:
        plain = conv.stride == conv.padding == conv.dilation == (1, 1) and conv.groups == 1
        return plain and WinogradWeight.takes(conv.weight)

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__(conv, torch.float32)
        self.dtype, self.winograd = dtype, WinogradWeight(self.weight)

    def of(self, x: Tensor) -> Tensor:
        return winograd_convolution_op.direct(x, self.winograd.forward, self.bias)

    def input_gradient(self, grad: Tensor, size: torch.Size) -> Tensor:
        return winograd_convolution_op.direct(grad, self.winograd.backward, None)


class _InFloat32(nn.Module):
    """A module of which autocast changes nothing."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            found: Tensor = self.module(x.float())
        return found


class _NormSilu(nn.Module):
    """nn.GroupNorm, then nn.SiLU."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.norm.weight, self.norm.bias, self.norm.num_groups, self.norm.eps)


class _Residual(torch.autograd.Function):
    """A `_Block` in one piece: as five nodes of autograd's graph it made sampling, forth and back, of 16 images of 16 px take
    1.04 times as long with one thread, 1.09 times with two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor | None, block: _Block) -> Tensor:
        first, stats1 = group_norm_silu_op.direct(x, *block.norm1, None, *block.grouping1)
        middle = block.conv1.of(first)
        second, stats2 = group_norm_silu_op.direct(middle, *block.norm2, shift, *block.grouping2)
        ctx.block = block
        ctx.save_for_backward(x, stats1, middle, stats2, shift)
        out = block.conv2.of(second).add_(x if block.shortcut is None else block.shortcut.of(x))
        return out if block.divisor == 1 else out.div_(block.divisor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, stats1, middle, stats2, shift = ctx.saved_tensors
        block = ctx.block
        if block.divisor != 1:
            grad = grad / block.divisor
        second = block.conv2.input_gradient(grad, middle.shape)
        between = group_norm_silu_backward_op.direct(second, middle, *block.norm2, shift, stats2, block.grouping2[0])
        first = block.conv1.input_gradient(between, x.shape)
        x_grad = group_norm_silu_backward_op.direct(first, x, *block.norm1, None, stats1, block.grouping1[0])
        beside = grad if block.shortcut is None else block.shortcut.input_gradient(grad, x.shape)
        return x_grad.add_(beside), None, None


class _Block(nn.Module):
    """diffusers' ResnetBlock2D in its plain form, after its convolutions were exchanged; the timestep is a constant."""

    conv1: _Convolution
    conv2: _Convolution
    shortcut: _Convolution | None
    time: _InFloat32 | None

    @staticmethod
    def replaces(module: Any) -> bool:
        return (
            _exactly(module, ResnetBlock2D)
            and isinstance(module.nonlinearity, nn.SiLU)
            and module.time_embedding_norm == "default"
            and not (module.up or module.down or module.skip_time_act)
            and all(isinstance(conv, _Convolution) for conv in (module.conv1, module.conv2))
            and isinstance(module.conv_shortcut, _Convolution | None)
        )

    def __init__(self, block: ResnetBlock2D) -> None:
        super().__init__()
        parts: Any = block.conv1, block.conv2, block.conv_shortcut, block.time_emb_proj
        self.conv1, self.conv2, self.shortcut, self.time = parts
        (self.norm1, self.grouping1), (self.norm2, self.grouping2) = map(_norm_of, (block.norm1, block.norm2))
        self.divisor = block.output_scale_factor

    def forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
        shift = None if self.time is None or temb is None else self.time(silu(temb))
        return _Residual.apply(self.conv1.taken(x), shift, self)


def _norm_of(norm: nn.GroupNorm) -> tuple[tuple[Tensor, Tensor], tuple[int, float]]:
    """Weight and bias, groups and eps, as `group_norm_silu_op` takes them."""
    return (norm.weight.detach(), norm.bias.detach()), (norm.num_groups, norm.eps)


class _Upsampling(nn.Module):
    """diffusers' Upsample2D in its plain form. With its change of layout, from 64 images on, most passes of 64 or 128 of
    16 px took 1.03 to 1.07 times as long."""

    @staticmethod
    def replaces(module: Any) -> bool:
        plain = _exactly(module, Upsample2D) and module.norm is None and module.interpolate and module.name == "conv"
        return plain and isinstance(module.conv, _Convolution)

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.conv = module.conv

    def forward(self, x: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        found: Tensor = self.conv(interpolate(x, output_size, None if output_size else 2.0, mode="nearest"))
        return found


class _Float32Softmax:
    """diffusers' AttnProcessor2_0, for images attending to themselves."""

    @staticmethod
    def replaces(module: Any) -> bool:
        return (
            _exactly(module, Attention)
            and _exactly(module.processor, AttnProcessor2_0)
            and module.group_norm is not None
            and not module.is_cross_attention
            and not any((module.spatial_norm, module.norm_q, module.norm_k))
        )

    def __call__(self, attn: Any, hidden_states: Tensor, temb: Tensor | None = None, **_: Any) -> Tensor:
        normed = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)
        q, k, v = (part(normed).unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in (attn.to_q, attn.to_k, attn.to_v))
        with torch.autocast(q.device.type, enabled=False):
            mixed = scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
        out = attn.to_out[0](mixed.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(hidden_states.shape)
        return (out + hidden_states if attn.residual_connection else out) / attn.rescale_output_factor


def _exchange(module: nn.Module, dtype: torch.dtype) -> None:
    """In everything below `module`."""
    part: Any
    for name, part in module.named_children():
        if name in _OF_THE_TIMESTEP:
            setattr(module, name, _InFloat32(part))
            continue
        _exchange(part, dtype)
        if _exactly(part, nn.Conv2d) and part.padding_mode == "zeros":
            exchanged = _Winograd if _Winograd.replaces(part) else _Convolution
            setattr(module, name, exchanged(part, dtype))
        elif _exactly(part, nn.Linear):
            part.to(dtype)
        elif _Block.replaces(part):
            setattr(module, name, _Block(part))
        elif _Upsampling.replaces(part):
            setattr(module, name, _Upsampling(part))
        elif _Float32Softmax.replaces(part):
            part.set_processor(_Float32Softmax())


def accelerated(denoiser: Denoiser, dtype: torch.dtype = torch.float32) -> Denoiser:
    """The same predictions up to rounding, differentiable once in x. Small weights are shared, the others copied.

    Args:
        denoiser: stays as it is; its network too, if it is no UNet2DModel in float32.
        dtype: float32, or bfloat16 for a network that will run under autocast to it.
    """
    network: Any = denoiser.network
    ops = group_norm_silu_op, winograd_convolution_op
    compiled = all(op.status(denoiser.device.type).chosen == op.implementations[0].backend for op in ops)
    if not compiled or not _exactly(network, UNet2DModel) or network.dtype != torch.float32:
        return denoiser
    kept = (p for module in network.modules() if isinstance(module, nn.GroupNorm) for p in module.parameters())
    network = copy.deepcopy(network, {id(p): p for p in kept})
    _exchange(network, dtype)
    if isinstance(network.conv_act, nn.SiLU):
        network.conv_norm_out, network.conv_act = _NormSilu(network.conv_norm_out), nn.Identity()
    return replace(denoiser, network=network)
