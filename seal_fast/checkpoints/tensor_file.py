"""Tensors of an untrusted file that is no model: safetensors or .npy, never pickle."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seal_fast.checkpoints.errors import CheckpointError, refusing

MAX_ELEMENTS = 1 << 30
FLOATS = {"F16", "BF16", "F32", "F64"}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors as float32, and metadata, of a safetensors file. The header is checked before memory is spent.

    Raises:
        CheckpointError: not a safetensors file, a tensor that is not floating point, or more than MAX_ELEMENTS values.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            headers = {name: file.get_slice(name) for name in names}
            for name, header in headers.items():
                if header.get_dtype() not in FLOATS:
                    raise CheckpointError(path, f"tensor {name!r} is {header.get_dtype()}, not floating point")
            if sum(math.prod(header.get_shape()) for header in headers.values()) > MAX_ELEMENTS:
                raise CheckpointError(path, f"holds more than {MAX_ELEMENTS} values: split it")
            return {name: file.get_tensor(name).float() for name in names}, file.metadata() or {}
    except FileNotFoundError:
        raise CheckpointError(path, "no such file") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(path, f"not a readable safetensors file: {error}") from error


def _read_npy(path: Path) -> Tensor:
    # numpy evaluates the header as Python literals, which fail in many ways
    with refusing(path, "not a readable .npy file"):
        # mapped, so that dtype and shape are known before memory is spent
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.floating):
        raise CheckpointError(path, "must hold one floating-point array")
    if array.size > MAX_ELEMENTS:
        raise CheckpointError(path, f"holds more than {MAX_ELEMENTS} values: split it")
    return torch.from_numpy(array.astype(np.float32))


def load_inputs(path: str | os.PathLike[str]) -> Tensor:
    """Noise inputs float32 [N,C,H,W] from a .npy file, or from a safetensors file with one tensor.

    Raises:
        CheckpointError: neither, or not finite floating-point [N,C,H,W].
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(path, "no such file")
    # opening a FIFO would wait for ever
    if not path.is_file():
        raise CheckpointError(path, "not a regular file")
    if path.suffix == ".npy":
        inputs = _read_npy(path)
    elif path.suffix == ".safetensors":
        tensors, _ = read_tensors(path)
        if len(tensors) != 1:
            raise CheckpointError(path, f"must hold one tensor, not {len(tensors)}")
        inputs = next(iter(tensors.values()))
    else:
        raise CheckpointError(path, "inputs are read from .npy or .safetensors")
    if inputs.ndim != 4 or inputs.numel() == 0:
        raise CheckpointError(path, f"inputs must be [N,C,H,W], not {list(inputs.shape)}")
    if not inputs.isfinite().all():
        raise CheckpointError(path, "inputs must be finite")
    return inputs
