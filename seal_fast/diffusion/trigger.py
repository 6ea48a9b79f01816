"""A trigger: what a noise-space backdoor adds to the noise a sampler starts from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Trigger:
    """A triggered input is x_T = gamma * eps + mu instead of eps (times the prior's scale).

    Attributes:
        mu: shift, float [C,H,W].
        gamma: noise scale, float [C,H,W], > 0 (1 where the attack leaves the noise alone).
    """

    mu: Tensor
    gamma: Tensor

    def __post_init__(self) -> None:
        if self.mu.ndim != 3 or self.gamma.shape != self.mu.shape:
            raise ValueError(f"mu and gamma must both be [C,H,W], not {tuple(self.mu.shape)} and {tuple(self.gamma.shape)}")

    @classmethod
    def shift(cls, mu: Tensor) -> Trigger:
        """A trigger that only shifts: gamma = 1."""
        return cls(mu, torch.ones_like(mu))

    def start(self, eps: Tensor) -> Tensor:
        """Triggered start for noise eps [N,C,H,W]."""
        return self.gamma * eps + self.mu

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write mu and gamma as safetensors, under a temporary name first so that a reader never sees half a file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        tensors = {"mu": self.mu.detach().cpu().contiguous(), "gamma": self.gamma.detach().cpu().contiguous()}
        save_file(tensors, partial, metadata={"format": "pt", **(metadata or {})})
        partial.replace(path)
