"""Calls of the compiled kernels. These take every argument by its name in the structs of csrc/, and tensors as addresses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from seal_fast.ops import backends

SUFFIXES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
"""What the name of a kernel ends with that is compiled for several dtypes."""


def launch(kernel: str, tensors: Mapping[str, Tensor | None], numbers: Mapping[str, float]) -> None:
    """Run a kernel of the extension for the device of the first tensor, on the current stream where that is a GPU.

    The kernel checks the names, and nothing else: not sizes, strides or dtypes.

    Args:
        kernel: its name in `seal_fast._native` or `seal_fast._native_cuda`.
        tensors: the arguments that are arrays, results included; None for one that is absent.
        numbers: all other arguments: sizes, strides, factors.
    """
    first = next(iter(tensors.values()))
    assert first is not None
    arguments = {**{name: _address(tensor) for name, tensor in tensors.items()}, **numbers}
    if first.is_cuda:
        getattr(backends.CUDA.module, kernel)(arguments, first.device.index, _stream(first))
    else:
        getattr(backends.CPU.module, kernel)(arguments, torch.get_num_threads())


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stream(like: Tensor) -> int:
    return torch.cuda.current_stream(like.device).cuda_stream
