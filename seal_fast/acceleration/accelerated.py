"""Replace parts of a frozen denoiser by faster equivalents.

    convolutions   store nothing of their input for the gradient, since the weights need none. Their weights are laid out
                   channels-last once. A 3 x 3 convolution does a quarter of the products
                   (`seal_fast.ops.winograd_convolution`)
    weights        are converted to the precision of the run once, where autocast would convert them in every pass. Those of
                   the timestep stay in float32: a bfloat16 product of so few numbers takes longer
    blocks         are one node of autograd's graph. Normalisation and activation are one op
                   (`seal_fast.ops.group_norm_silu`), which adds the timestep as well
    upsampling     keeps the memory layout of 64 or more images too; diffusers changes it for the sake of a GPU kernel
    attention      has its softmax in float32: the gradient of torch's bfloat16 kernel takes fifteen times as long

torch.compile adds nothing to that (0.97 of the speed on AVX2, after two minutes of compiling). A module of an unknown form
stays as it is. All of this was measured on CPUs only, so on other devices the network stays as it is.
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

_TIMESTEP_MODULES = ("time_embedding", "time_emb_proj")
"""Names of the timestep's modules in UNet2DModel and in its blocks."""


def _exactly(part: Any, expected: Any) -> bool:
    """Whether `part` is of this very class: a subclass may compute something else."""
    return type(part) is expected


class _FrozenConvolution(torch.autograd.Function):
    """A convolution that stores the size of its input for the gradient, where torch would store the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, conv: _Convolution) -> Tensor:
        ctx.size, ctx.conv = x.shape, conv
        return conv.convolve(x)

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

    def prepare_input(self, x: Tensor) -> Tensor:
        """Cast x to the precision of the run, in the layout of the weight."""
        return x.to(self.dtype, memory_format=torch.channels_last)

    def convolve(self, x: Tensor) -> Tensor:
        """Convolve an input that `prepare_input` has cast and laid out."""
        return conv2d(x, self.weight, self.bias, *self.geometry)

    def input_gradient(self, grad: Tensor, size: torch.Size) -> Tensor:
        """Gradient with respect to the input, given its shape and the gradient with respect to the output."""
        # only the size and the layout of the input matter
        x = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
        *sides, groups = self.geometry
        return torch.ops.aten.convolution_backward(
            grad, x, self.weight, None, *sides, False, (0, 0), groups, (True, False, False)
        )[0]

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenConvolution.apply(self.prepare_input(x), self)


class _Winograd(_Convolution):
    """A 3 x 3 convolution with stride 1 and padding 1, which computes in float32 for every input.

    With its gradient it was 1.3 (16 channels) to 2.5 times as fast as oneDNN in float32 on AVX2. On AVX-512 a forward and
    backward pass of 64 images of 16 px under bfloat16, with one thread, took .89 of its time with oneDNN's bfloat16.
    """

    @staticmethod
    def replaces(conv: nn.Conv2d) -> bool:
        plain = conv.stride == conv.padding == conv.dilation == (1, 1) and conv.groups == 1
        return plain and WinogradWeight.takes(conv.weight)

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__(conv, torch.float32)
        self.dtype, self.winograd = dtype, WinogradWeight(self.weight)

    def convolve(self, x: Tensor) -> Tensor:
        return winograd_convolution_op.direct(x, self.winograd.forward, self.bias)

    def input_gradient(self, grad: Tensor, size: torch.Size) -> Tensor:
        return winograd_convolution_op.direct(grad, self.winograd.backward, None)


class _InFloat32(nn.Module):
    """A module that autocast leaves in float32."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            output: Tensor = self.module(x.float())
        return output


class _NormSilu(nn.Module):
    """nn.GroupNorm, then nn.SiLU."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.norm.weight, self.norm.bias, self.norm.num_groups, self.norm.eps)


class _Residual(torch.autograd.Function):
    """A `_Block` as one node of autograd's graph.

    As five nodes it made a forward and backward pass through sampling of 16 images of 16 px take 1.04 times as long with one
    thread, 1.09 times with two.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor | None, block: _Block) -> Tensor:
        first, stats1 = group_norm_silu_op.direct(x, *block.norm1, None, *block.grouping1)
        between = block.conv1.convolve(first)
        second, stats2 = group_norm_silu_op.direct(between, *block.norm2, shift, *block.grouping2)
        ctx.block = block
        ctx.save_for_backward(x, stats1, between, stats2, shift)
        out = block.conv2.convolve(second).add_(x if block.shortcut is None else block.shortcut.convolve(x))
        return out if block.divisor == 1 else out.div_(block.divisor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, stats1, between, stats2, shift = ctx.saved_tensors
        block = ctx.block
        if block.divisor != 1:
            grad = grad / block.divisor
        second = block.conv2.input_gradient(grad, between.shape)
        between_grad = group_norm_silu_backward_op.direct(second, between, *block.norm2, shift, stats2, block.grouping2[0])
        first = block.conv1.input_gradient(between_grad, x.shape)
        x_grad = group_norm_silu_backward_op.direct(first, x, *block.norm1, None, stats1, block.grouping1[0])
        shortcut_grad = grad if block.shortcut is None else block.shortcut.input_gradient(grad, x.shape)
        return x_grad.add_(shortcut_grad), None, None


class _Block(nn.Module):
    """diffusers' ResnetBlock2D in its plain form, after its convolutions were replaced. The timestep needs no gradient."""

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
        (self.norm1, self.grouping1), (self.norm2, self.grouping2) = map(_norm_arguments, (block.norm1, block.norm2))
        self.divisor = block.output_scale_factor

    def forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
        shift = None if self.time is None or temb is None else self.time(silu(temb))
        return _Residual.apply(self.conv1.prepare_input(x), shift, self)


def _norm_arguments(norm: nn.GroupNorm) -> tuple[tuple[Tensor, Tensor], tuple[int, float]]:
    """Weight and bias, groups and eps, as `group_norm_silu_op` takes them."""
    return (norm.weight.detach(), norm.bias.detach()), (norm.num_groups, norm.eps)


class _Upsampling(nn.Module):
    """diffusers' Upsample2D in its plain form, without the change of layout that diffusers makes from 64 images on.

    With the change most passes of 64 or 128 images of 16 px took 1.03 to 1.07 times as long.
    """

    @staticmethod
    def replaces(module: Any) -> bool:
        plain = _exactly(module, Upsample2D) and module.norm is None and module.interpolate and module.name == "conv"
        return plain and isinstance(module.conv, _Convolution)

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.conv = module.conv

    def forward(self, x: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        output: Tensor = self.conv(interpolate(x, output_size, None if output_size else 2.0, mode="nearest"))
        return output


class _Float32Softmax:
    """diffusers' AttnProcessor2_0 for self-attention, with the softmax in float32."""

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


def _replace_parts(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace what has a faster equivalent, in everything below `module`."""
    part: Any
    for name, part in module.named_children():
        if name in _TIMESTEP_MODULES:
            setattr(module, name, _InFloat32(part))
            continue
        _replace_parts(part, dtype)
        if _exactly(part, nn.Conv2d) and part.padding_mode == "zeros":
            faster = _Winograd if _Winograd.replaces(part) else _Convolution
            setattr(module, name, faster(part, dtype))
        elif _exactly(part, nn.Linear):
            part.to(dtype)
        elif _Block.replaces(part):
            setattr(module, name, _Block(part))
        elif _Upsampling.replaces(part):
            setattr(module, name, _Upsampling(part))
        elif _Float32Softmax.replaces(part):
            part.set_processor(_Float32Softmax())


def accelerated(denoiser: Denoiser, dtype: torch.dtype = torch.float32) -> Denoiser:
    """A denoiser with the same predictions up to rounding, differentiable once in x.

    It shares the weights of the normalisations with `denoiser` and holds copies of all others.

    Args:
        denoiser: it stays as it is, and is returned itself if its network is no UNet2DModel in float32, or if an op is not
            compiled for its device.
        dtype: float32, or bfloat16 for a network that will run under autocast to it.
    """
    network: Any = denoiser.network
    ops = group_norm_silu_op, winograd_convolution_op
    compiled = all(op.status(denoiser.device.type).chosen == op.implementations[0].backend for op in ops)
    if not compiled or not _exactly(network, UNet2DModel) or network.dtype != torch.float32:
        return denoiser
    shared = (p for module in network.modules() if isinstance(module, nn.GroupNorm) for p in module.parameters())
    network = copy.deepcopy(network, {id(p): p for p in shared})
    _replace_parts(network, dtype)
    if isinstance(network.conv_act, nn.SiLU):
        network.conv_norm_out, network.conv_act = _NormSilu(network.conv_norm_out), nn.Identity()
    return replace(denoiser, network=network)
