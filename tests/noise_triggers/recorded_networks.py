"""Small networks whose calls are recorded, and reversions of them by TERD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from seal_fast.diffusion import VP, Denoiser, NoiseProcess
from seal_fast.noise_triggers import Reversion, TerdSettings, reverse_trigger

SHAPE = (3, 5, 4)
STEPS = 40
QUIET = TerdSettings(
    estimation_iterations=1,
    refinement_iterations=0,
    batch=3,
    gamma_start=1.0,
    gamma_learning_rate=0.0,
    refinement_momentum=0.0,
    refinement_clip=1e9,
    l1=0.0,
    window=0.1,
    sampler_steps=4,
    half_precision=False,
)
"""One exact step of mu; each test turns on what it examines."""


class Nonlinear(nn.Module):
    """A small random function of x and t, in the dtype of its weights."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = (t.to(x.dtype) / 100).sin().reshape(-1, 1, 1, 1)
        return self.second((self.first(x) + time).tanh())


class Function(nn.Module):
    """Any function of x and t as a network; a network has parameters, by which its device is known."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.unused = function, nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.function(x, t)


class Recorder(nn.Module):
    """Passes everything to `inner` and remembers what came in."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.autocast: set[bool] = set()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append((x.detach().clone(), t.clone()))
        self.autocast.add(torch.is_autocast_enabled("cpu"))
        return self.inner(x, t)

    @property
    def images(self) -> int:
        return sum(len(x) for x, _ in self.calls)


def constant(value: float = 0.0) -> Function:
    """A constant prediction: the reversed loss has no gradient, so only the L1 term acts."""
    return Function(lambda x, t: 0 * x + value)


def revert(network: nn.Module, settings: TerdSettings, process: NoiseProcess | None = None, seed: int = 0) -> Reversion:
    return reverse_trigger(Denoiser(network, process or VP.linear(STEPS), SHAPE), settings, seed=seed)


def start_of(seed: int) -> Tensor:
    return revert(constant(), replace(QUIET, estimation_iterations=0), seed=seed).trigger.mu


def pair_loss(f1: Tensor, f2: Tensor, eps1: Tensor, eps2: Tensor) -> Tensor:
    """Half the squared norm of the difference of the two residuals, averaged over the pairs."""
    losses = [0.5 * ((eps1[i] - f1[i]) - (eps2[i] - f2[i])).pow(2).sum() for i in range(len(eps1))]
    return torch.stack(losses).mean()


def fresh_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (1,), generator=generator))
