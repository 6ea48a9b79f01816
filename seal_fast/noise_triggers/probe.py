"""What every search asks of the suspect: predicted noise, counted, at the precision the hardware is fast at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from seal_fast.acceleration import accelerated
from seal_fast.acceleration.cuda_graph import Record, capture_graph
from seal_fast.acceleration.graph_cache import GraphCache, GraphCachedNetwork
from seal_fast.diffusion import Denoiser
from seal_fast.noise_triggers.reversion import rows_per_pass
from seal_fast.training import native_bfloat16

COARSE = 4
"""Side of the random grid that starts are made from: triggers are images, not noise."""


Iteration = Callable[..., tuple[Tensor, ...]]
"""A function of a probe and of tensors on its device, which it leaves as they are, to tensors. It draws nothing and waits for
nothing, so that a CUDA graph can hold it; and equal ones do the same."""


@dataclass
class Probe:
    """A denoiser under examination.

    Attributes:
        denoiser: the suspect model; becomes its accelerated equivalent.
        generator: source of all noise, on the CPU so that a seed means the same run on every device.
        half_precision: bfloat16 autocast where the hardware has it.
        record: how iterations are recorded, see `seal_fast.acceleration.cuda_graph`; None for not at all, or on a GPU as CUDA
            graphs.
        evaluations: denoiser evaluations spent so far, counted in images.
        sampled: the denoiser for passes without a gradient, which are recorded where iterations are.
    """

    denoiser: Denoiser
    generator: torch.Generator
    half_precision: bool
    record: Record | None = None
    evaluations: int = 0

    def __post_init__(self) -> None:
        self.denoiser = accelerated(self.denoiser, torch.bfloat16 if self.autocasts else torch.float32)
        if self.record is None and self.denoiser.device.type == "cuda":
            self.record = capture_graph
        self.replayed = None if self.record is None else GraphCache(self.record)
        self.sampled = self.denoiser
        if self.replayed is not None:
            self.sampled = replace(self.denoiser, network=GraphCachedNetwork(self.denoiser.network, self.replayed))
        self._finite = torch.ones((), dtype=torch.bool, device=self.denoiser.device)

    @property
    def finite(self) -> bool:
        """False once an answer was not."""
        return bool(self._finite)

    @property
    def autocasts(self) -> bool:
        return self.half_precision and native_bfloat16(self.denoiser.device)

    def noise(self, count: int) -> Tensor:
        """eps [count,C,H,W]."""
        return self.on_device(torch.randn(count, *self.denoiser.shape, generator=self.generator))

    def on_device(self, x: Tensor) -> Tensor:
        # a copy from ordinary memory would wait for the GPU
        pinned = self.denoiser.device.type == "cuda" and not x.is_cuda
        return (x.pin_memory() if pinned else x).to(self.denoiser.device, non_blocking=True)

    def coarse_images(self, count: int) -> Tensor:
        """Smooth random images [count,C,H,W]."""
        channels, height, width = self.denoiser.shape
        grid = torch.randn(count, channels, COARSE, COARSE, generator=self.generator).to(self.denoiser.device)
        return torch.nn.functional.interpolate(grid, size=(height, width), mode="bilinear")

    def precision(self) -> torch.autocast:
        return torch.autocast(self.denoiser.device.type, torch.bfloat16, enabled=self.autocasts)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """f(x [N,C,H,W], t int64 [N]) as float32, differentiable in x. Part of an iteration: `run` counts its images."""
        rows = rows_per_pass(x)
        with self.precision():
            f = torch.cat([self.denoiser(*part).float() for part in zip(x.split(rows), t.split(rows), strict=True)])
        self._finite.logical_and_(f.detach().isfinite().all())
        return f

    @torch.no_grad()
    def run(self, iteration: Iteration, t: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """`iteration(self, t, *inputs)` on the denoiser's device, where the GPU is asked as one graph.

        Args:
            iteration: see `Iteration`.
            t: int64 [N], the timesteps of the images that it puts through the denoiser.
            inputs: all else that is not the same at every call.
        """
        self.evaluations += len(t)
        moved = [self.on_device(x) for x in (t, *inputs)]
        if self.replayed is None:
            return iteration(self, *moved)
        return self.replayed(iteration, partial(iteration, self), *moved)

    def padded(self, x: Tensor, rows: int) -> Tensor:
        """x [K,...] with its first row again, up to `rows`, where iterations are recorded: a recording is for one shape."""
        return x if self.replayed is None else torch.cat([x, x[:1].expand(rows - len(x), *x.shape[1:])])
