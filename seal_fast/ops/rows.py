"""Rows and groups of rows: what the ops of reversion have in common.

They work on rows [R, ...]. What belongs to a candidate (its mu, its gamma, its coefficients) has G rows, G a divisor of R, and
serves R / G consecutive rows of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seal_fast.ops import native
from seal_fast.ops.dispatch import Implementation


def serving(groups: Tensor, rows: int) -> Tensor:
    """[G, ...] to [rows, ...]: every group repeated for the rows it serves."""
    return groups if len(groups) == rows else groups.repeat_interleave(rows // len(groups), 0)


def served(rows: Tensor, groups: int) -> Tensor:
    """The adjoint: [R, ...] to [groups, ...], summed over the rows each serves."""
    return rows if len(rows) == groups else rows.unflatten(0, (groups, len(rows) // groups)).sum(1)


def columns(coefficients: Tensor, like: Tensor) -> list[Tensor]:
    """A table [G,C] as its C columns, each [R,1] in the dtype of `like` [R,D]."""
    return list(serving(coefficients.to(like.dtype), len(like))[:, :, None].unbind(1))


def check_rows(x: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError unless x is floating point [R, ...] and the others that are given have its shape and device."""
    if not x.is_floating_point() or x.ndim < 2 or x.shape[1:].numel() == 0:
        raise ValueError(f"rows must be floating point [rows, dimensions ...], not {x.dtype} {tuple(x.shape)}")
    for name, other in others.items():
        if other is not None and (other.shape != x.shape or other.device != x.device or not other.is_floating_point()):
            raise ValueError(
                f"{name} must be floating point {tuple(x.shape)} on {x.device}, "
                f"not {other.dtype} {tuple(other.shape)} on {other.device}"
            )


def check_groups(x: Tensor, shape: tuple[int, ...], **groups: Tensor | None) -> None:
    """Raises ValueError unless those that are given are floating point [G, *shape] on x's device, G a divisor of its rows."""
    for name, group in groups.items():
        if group is None:
            continue
        if not group.is_floating_point() or group.shape[1:] != shape or group.ndim == 0 or group.device != x.device:
            raise ValueError(
                f"{name} must be floating point [groups, {', '.join(map(str, shape))}] on {x.device}, "
                f"not {group.dtype} {tuple(group.shape)} on {group.device}"
            )
        if len(group) == 0 or len(x) % len(group):
            raise ValueError(f"{name} has {len(group)} rows, which cannot each serve as many of the {len(x)} rows of x")


def matrices(*tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors [rows, ...] as dense [rows, D] in one dtype: float64 if any is, else float32."""
    dtype = torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    return [None if t is None else t.to(dtype).flatten(1).contiguous() for t in tensors]


def address(x: Tensor | None) -> int:
    """As the kernels take it; 0 for a tensor that is absent."""
    return 0 if x is None else x.data_ptr()


def stream(like: Tensor) -> int:
    """The CUDA stream that work on this tensor belongs on."""
    return torch.cuda.current_stream(like.device).cuda_stream


def implementations(cuda: Callable[..., Any], cpu: Callable[..., Any], reference: Callable[..., Any]) -> list[Implementation]:
    """Fastest first; the kernels are compiled for float32, which the first argument has if all data do."""
    return [
        Implementation("cuda", cuda, "cuda", lambda: native.CUDA.reason, _refuse_float64),
        Implementation("cpu", cpu, "cpu", lambda: native.CPU.reason, _refuse_float64),
        Implementation("reference", reference),
    ]


def _refuse_float64(first: Tensor, *_: Any) -> str | None:
    return "its kernels have no float64" if first.dtype == torch.float64 else None
