"""3 x 3 convolution by Winograd's F(4x4, 3x3) (Lavin and Gray 2016, arXiv 1509.09308), with a weight that is a constant.

    Y = A' [ (G g G') * (B' d B) ] A

for a tile Y of 4 x 4 outputs, a filter g and the 6 x 6 inputs d around the tile: 36 products in place of 144. The weight is
transformed once, so this is for models that are examined, not trained. Rounding errors are about ten times those of the plain
sum. (In float32 the largest is some 3e-5 of the size of the result with 32 channels, 1e-4 with 512.)
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from seal_fast.ops import backends
from seal_fast.ops._arguments import check_constant, check_tensor, only
from seal_fast.ops._launch import SUFFIXES, launch
from seal_fast.ops.dispatch import Implementation, Op

TILE, INPUT = 4, 6
CHANNELS = 16
"""Channel counts must be multiples of this, the number of lanes of the widest vector."""
_DTYPES = {(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.float32)}
"""Allowed dtypes of x and of the weight."""
_INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
_WEIGHT = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


@dataclass(frozen=True)
class WinogradWeight:
    """A constant weight and its two transforms, for outputs and for gradients of the input; each is computed when first used.

    Attributes:
        plain: [F,C,3,3], both multiples of `CHANNELS`.

    Raises:
        ValueError: another shape, or a weight that requires gradients.
    """

    plain: Tensor

    def __post_init__(self) -> None:
        if not self.takes(self.plain):
            raise ValueError(
                f"weight must be floating point [filters, channels, 3, 3], both multiples of {CHANNELS},"
                f" not {self.plain.dtype} {tuple(self.plain.shape)}"
            )
        check_constant("weight", self.plain)

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Whether a weight of an `nn.Conv2d` has the right shape."""
        plain = weight.is_floating_point() and weight.ndim == 4 and weight.shape[2:] == (3, 3)
        return plain and not any(channels % CHANNELS for channels in weight.shape[:2])

    @cached_property
    def forward(self) -> Tensor:
        """G g G', [36,C,F]."""
        return _transformed(self.plain)

    @cached_property
    def backward(self) -> Tensor:
        """[36,F,C]: the gradient of the input is a convolution too, with filters that are rotated by 180 degrees."""
        return _transformed(self.plain.flip(2, 3).transpose(0, 1))


def _exact(like: Tensor) -> AbstractContextManager[object]:
    """A context without autocast, which would compute the transforms in bfloat16 and so amplify its rounding errors."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _transformed(weight: Tensor) -> Tensor:
    g = torch.tensor(_WEIGHT, dtype=weight.dtype, device=weight.device)
    with _exact(weight):
        return torch.tensordot(torch.kron(g, g), weight.permute(2, 3, 1, 0).flatten(0, 1), dims=1)


def reference_winograd_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `winograd_convolution`; weight is [36,C,F], and bias in its dtype."""
    dtype, x = x.dtype, x.to(weight.dtype)
    a, b = (torch.tensor(m, dtype=x.dtype, device=x.device) for m in (_OUTPUT, _INPUT))
    height, width = x.shape[2:]
    # a tile sees one pixel around itself; tiles at the right and lower edge may lie half outside
    padded = pad(x, (1, 1 + -width % TILE, 1, 1 + -height % TILE))
    d = padded.unfold(2, INPUT, TILE).unfold(3, INPUT, TILE)
    with _exact(x):
        products = torch.einsum("abcf,ai,nchwij,bj->nfhwab", weight.view(INPUT, INPUT, *weight.shape[1:]), b, d, b)
        tiles = torch.einsum("pa,nfhwab,qb->nfhpwq", a, products, a)
    out = tiles.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]
    out = out if bias is None else out + bias[:, None, None]
    return out.to(dtype, memory_format=torch.channels_last)


def _new_out(x: Tensor, weight: Tensor) -> Tensor:
    images, _, height, width = x.shape
    return torch.empty(
        images, weight.shape[2], height, width, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )


def _run_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, out = x.contiguous(memory_format=torch.channels_last), _new_out(x, weight)
    images, channels, height, width = x.shape
    filters = weight.shape[2]
    workspace = torch.empty(backends.CPU.module.winograd_workspace(channels, filters, torch.get_num_threads()))
    tensors = {"x": x, "weight": weight, "bias": bias, "out": out, "workspace": workspace}
    sizes = {"images": images, "height": height, "width": width, "channels": channels, "filters": filters}
    launch(f"winograd_convolution_{SUFFIXES[x.dtype]}", tensors, sizes)
    return out


winograd_convolution_op = Op(
    "winograd_convolution(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    [
        Implementation("cpu", _run_kernel, backends.CPU.missing, only(torch.float32, torch.bfloat16)),
        Implementation("reference", reference_winograd_convolution),
    ],
    fake=lambda x, weight, bias: _new_out(x, weight),
)


class _WinogradConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: WinogradWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return winograd_convolution_op(x, weight.forward, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return winograd_convolution_op(grad, ctx.weight.backward, None), None, None


def winograd_convolution(x: Tensor, weight: WinogradWeight, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.conv2d(x, weight.plain, bias, padding=1)`.

    Args:
        x: [N,C,H,W] in the dtype of the weight, float32 or float64; or bfloat16 with a weight in float32, and then computed in
            float32. Channels-last, or it is copied to be so.
        weight: filters [F,C,3,3], transformed.
        bias: [F] in the dtype of the weight, constant; None for none.

    Returns:
        [N,F,H,W] in the dtype of x, channels-last; differentiable once in x, which is not kept for the gradient.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, or a bias that requires gradients.
    """
    plain = weight.plain
    if (x.dtype, plain.dtype) not in _DTYPES:
        raise ValueError(
            f"x and weight must both be float32 or both float64, or bfloat16 and float32, not {x.dtype} and {plain.dtype}"
        )
    check_tensor("x", x, ("N", plain.shape[1], "H", "W"), plain, x.dtype)
    if x.numel() == 0:
        raise ValueError(f"x must have no size 0, but is {list(x.shape)}")
    check_tensor("bias", bias, plain.shape[:1], plain, plain.dtype)
    check_constant("bias", bias)
    return _WinogradConvolution.apply(x, weight, None if bias is None else bias.contiguous())
