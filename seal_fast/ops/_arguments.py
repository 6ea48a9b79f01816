"""What all ops ask of their tensors, and the form in which kernels take batches of items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

Shape = Sequence[int | str | EllipsisType]
"""Sizes that are known, names of sizes that are free; `...` at the end stands for one or more axes with no size 0."""


def check_tensor(
    name: str, tensor: Tensor | None, shape: Shape, like: Tensor | None = None, dtype: torch.dtype | None = None
) -> None:
    """Raise ValueError unless the tensor has this shape, the device of `like` and this dtype; None passes.

    `dtype` None stands for any floating point dtype.
    """
    if tensor is None:
        return
    right_dtype = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
    if right_dtype and _fits(tensor.shape, shape) and (like is None or tensor.device == like.device):
        return
    wanted = f"{'floating point' if dtype is None else dtype} {_written(shape)}"
    place = "" if like is None else f" on {like.device}"
    raise ValueError(f"{name} must be {wanted}{place}, not {tensor.dtype} {_written(tensor.shape)} on {tensor.device}")


def _fits(sizes: torch.Size, shape: Shape) -> bool:
    if sizes == shape:
        return True
    if shape and shape[-1] is ...:
        fixed = len(shape) - 1
        return len(sizes) > fixed and 0 not in sizes[fixed:] and _fits(sizes[:fixed], shape[:-1])
    if len(sizes) != len(shape):
        return False
    for size, want in zip(sizes, shape, strict=True):  # noqa: SIM110 - a generator takes twice as long
        if size != want and not isinstance(want, str):
            return False
    return True


def _written(shape: Shape) -> str:
    return f"[{', '.join('...' if size is ... else str(size) for size in shape)}]"


def check_constant(name: str, tensor: Tensor | None) -> None:
    """Raise ValueError for a tensor that requires a gradient which the op does not compute."""
    if tensor is not None and tensor.requires_grad:
        raise ValueError(f"{name} is a constant here: freeze it with requires_grad_(False)")


def matrices(*tensors: Tensor) -> list[Tensor]:
    """Batches [N, ...] as dense [N,D] in one dtype: float64 if any is, else float32."""
    dtype = computed_in(*tensors)
    return [tensor.to(dtype).flatten(1).contiguous() for tensor in tensors]


def computed_in(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of sums and of intermediate results: float64 if a tensor is, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def only(*dtypes: torch.dtype) -> Callable[..., str | None]:
    """For `Implementation.refuse`: kernels that are compiled for these dtypes of the op's first argument."""

    def refuse(first: Tensor, *_: Any) -> str | None:
        return None if first.dtype in dtypes else f"its kernels have no {str(first.dtype).removeprefix('torch.')}"

    return refuse
