"""Calls of the compiled kernels. These take every argument by its name in the structs of csrc/, and tensors as addresses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from seal_fast.ops import backends

SUFFIXES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
"""What the name of a kernel ends with that is compiled for several dtypes."""


Value = float | tuple[int, ...]


def launch(kernel: str, tensors: Mapping[str, Tensor | None], numbers: Mapping[str, Value]) -> None:
    """Run a kernel of the extension for the device of the first tensor, on the current stream where that is a GPU.

    The kernel checks the names of its arguments, and nothing else: not sizes, strides or dtypes.

    Args:
        kernel: its name in `seal_fast._native` or `seal_fast._native_cuda`.
        tensors: the arguments that are arrays, results included; None for one that is absent.
        numbers: all other arguments: sizes, strides and factors.
    """
    arguments: dict[str, Value] = {name: 0 if x is None else x.data_ptr() for name, x in tensors.items()}
    arguments.update(numbers)
    first = next(iter(tensors.values()))
    if first is not None and first.is_cuda:
        stream = torch.cuda.current_stream(first.device).cuda_stream
        getattr(backends.CUDA.module, kernel)(arguments, first.device.index, stream)
    else:
        getattr(backends.CPU.module, kernel)(arguments, torch.get_num_threads())
