"""A noise-space trigger, and the safetensors file that holds it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from seal_fast.checkpoints.errors import CheckpointError
from seal_fast.checkpoints.tensor_file import read_tensors
from seal_fast.io import write_atomically


@dataclass(frozen=True)
class Trigger:
    """A shift and a scale of the noise that a sampler starts from: gamma eps + mu instead of eps, both times the prior scale.

    Attributes:
        mu: shift, float [C,H,W].
        gamma: noise scale, float [C,H,W], > 0 (1 where the attack leaves the noise alone).
        prior_scale: standard deviation of the model's starting noise, `NoiseProcess.prior_scale`; 1 for VP models. mu and gamma
            are in units of it, so only the comparison with inputs from outside needs it.
    """

    mu: Tensor
    gamma: Tensor
    prior_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.mu.ndim != 3 or self.gamma.shape != self.mu.shape:
            raise ValueError(f"mu and gamma must both be [C,H,W], not {tuple(self.mu.shape)} and {tuple(self.gamma.shape)}")

    @classmethod
    def shift(cls, mu: Tensor) -> Trigger:
        """A trigger that only shifts: gamma = 1."""
        return cls(mu, torch.ones_like(mu))

    def start(self, eps: Tensor) -> Tensor:
        """Triggered start for noise eps [N,C,H,W], in units of the prior scale."""
        return self.gamma * eps + self.mu

    def to(self, device: torch.device) -> Trigger:
        """The same trigger on another device."""
        return replace(self, mu=self.mu.to(device), gamma=self.gamma.to(device))

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write mu, gamma and the prior scale as safetensors; the file appears whole or not at all."""
        tensors = {"mu": self.mu.detach().cpu().contiguous(), "gamma": self.gamma.detach().cpu().contiguous()}
        header = {"format": "pt", "prior_scale": repr(self.prior_scale), **(metadata or {})}
        write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata=header))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trigger:
        """Read a file of `save`, as float32. Safe for files of unknown origin.

        A gamma or a prior scale that the file does not have is 1.

        Raises:
            CheckpointError: not a safetensors file, no mu, other tensors or shapes, values that are not finite, a gamma below
                0, or a prior scale that is not a positive number.
        """
        path = Path(path)
        tensors, metadata = read_tensors(path)
        if "mu" not in tensors or not tensors.keys() <= {"mu", "gamma"}:
            raise CheckpointError(path, f"a trigger file holds mu and gamma, this one {sorted(tensors) or 'nothing'}")
        mu = tensors["mu"]
        gamma = tensors.get("gamma", torch.ones_like(mu))
        if mu.ndim != 3 or mu.numel() == 0 or gamma.shape != mu.shape:
            raise CheckpointError(path, f"mu and gamma must both be [C,H,W], not {tuple(mu.shape)} and {tuple(gamma.shape)}")
        if not (mu.isfinite().all() and gamma.isfinite().all() and (gamma >= 0).all()):
            raise CheckpointError(path, "mu and gamma must be finite and gamma not negative")
        return cls(mu, gamma, _prior_scale(path, metadata.get("prior_scale", "1")))


def _prior_scale(path: Path, text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not 0 < scale < math.inf:
        raise CheckpointError(path, f"prior_scale must be a positive number, not {text!r}")
    return scale
