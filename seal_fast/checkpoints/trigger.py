"""Trigger files, and the inputs to hold against a trigger: safetensors or .npy, never pickle."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seal_fast.checkpoints.errors import CheckpointError
from seal_fast.diffusion import Trigger

PRIOR_SCALE = "prior_scale"
"""Metadata key of a trigger file: standard deviation of the noise its model starts from."""
MAX_ELEMENTS = 1 << 30
FLOATS = {"F16", "BF16", "F32", "F64"}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors as float32 and metadata of a safetensors file whose header has been checked first."""
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


def load_trigger(path: str | os.PathLike[str]) -> Trigger:
    """A trigger as `Trigger.save` or a scan wrote it: float [C,H,W] tensors mu and gamma (1 if absent), as float32.

    Raises:
        CheckpointError: not a safetensors file, no mu, other shapes, values that are not finite, or gamma below 0.
    """
    path = Path(path)
    tensors, _ = _read(path)
    if "mu" not in tensors or not tensors.keys() <= {"mu", "gamma"}:
        raise CheckpointError(path, f"a trigger file holds mu and gamma, this one {sorted(tensors) or 'nothing'}")
    mu = tensors["mu"]
    gamma = tensors.get("gamma", torch.ones_like(mu))
    if mu.ndim != 3 or mu.numel() == 0 or gamma.shape != mu.shape:
        raise CheckpointError(path, f"mu and gamma must both be [C,H,W], not {tuple(mu.shape)} and {tuple(gamma.shape)}")
    if not (mu.isfinite().all() and gamma.isfinite().all() and (gamma >= 0).all()):
        raise CheckpointError(path, "mu and gamma must be finite and gamma not negative")
    return Trigger(mu, gamma)


def load_prior_scale(path: str | os.PathLike[str]) -> float:
    """The prior's scale a scan noted in a trigger file; 1, that of every VP model, where none is noted.

    Raises:
        CheckpointError: the file cannot be read, or what it notes is no positive number.
    """
    path = Path(path)
    noted = _read(path)[1].get(PRIOR_SCALE, "1")
    try:
        scale = float(noted)
    except ValueError:
        scale = math.nan
    if not 0 < scale < math.inf:
        raise CheckpointError(path, f"{PRIOR_SCALE} must be a positive number, not {noted!r}")
    return scale


def _read_npy(path: Path) -> Tensor:
    try:
        # mapped, so that dtype and shape are known before memory is spent
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise CheckpointError(path, "no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(path, f"not a readable .npy file: {error}") from error
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
    if path.suffix == ".npy":
        inputs = _read_npy(path)
    elif path.suffix == ".safetensors":
        tensors, _ = _read(path)
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
