"""The suspect model as a search uses it: predicts noise and samples at the hardware's fast precision, and counts the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import InitVar, dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from seal_fast.acceleration import accelerated
from seal_fast.acceleration.cuda_graph import Record, capture_graph
from seal_fast.acceleration.graph_cache import GraphCache, GraphCachedNetwork
from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import Denoiser, NoiseSource, sample
from seal_fast.training import OnStep, native_bfloat16, quiet

PIXELS_PER_PASS = 2**18
"""Pixels per forward pass without gradients, which bounds its memory: 1024 images of 16 px, 4 of 256 px."""

Iteration = Callable[..., tuple[Tensor, ...]]
"""Takes a probe and tensors on its device, which it does not change, and returns tensors. It draws no random number and does
not wait for the GPU, so that a CUDA graph can hold it. Iterations that compare equal compute the same."""


@dataclass
class Probe:
    """A denoiser under examination.

    Attributes:
        denoiser: the suspect model; becomes its accelerated equivalent.
        seed: seed of all noise.
        half_precision: bfloat16 autocast where the hardware has it.
        record: how iterations are recorded, see `seal_fast.acceleration.cuda_graph`. None records none on a CPU, and CUDA
            graphs on a GPU.
        on_step: progress callback (stage, iteration, total, loss per dimension).
        pixels_per_pass: pixels per forward pass at most.
        evaluations: denoiser evaluations spent so far, counted in images.
        noise_source: source of all noise.
        graphs: iterations and passes that were recorded; None if none are.
        sampled: the denoiser for passes without a gradient, which are recorded where iterations are.
    """

    denoiser: Denoiser
    seed: InitVar[int]
    half_precision: bool
    record: Record | None = None
    on_step: OnStep = quiet
    pixels_per_pass: int = PIXELS_PER_PASS
    evaluations: int = field(default=0, init=False)
    noise_source: NoiseSource = field(init=False)
    graphs: GraphCache | None = field(init=False)
    sampled: Denoiser = field(init=False)

    def __post_init__(self, seed: int) -> None:
        self.denoiser = accelerated(self.denoiser, torch.bfloat16 if self.autocasts else torch.float32)
        self.noise_source = NoiseSource(self.denoiser.device, seed)
        if self.record is None and self.denoiser.device.type == "cuda":
            self.record = capture_graph
        self.graphs = None if self.record is None else GraphCache(self.record)
        self.sampled = self.denoiser
        if self.graphs is not None:
            self.sampled = replace(self.denoiser, network=GraphCachedNetwork(self.denoiser.network, self.graphs))
        self._finite = torch.ones((), dtype=torch.bool, device=self.denoiser.device)
        self._samplers: dict[tuple[str, int], TriggeredSampler] = {}

    @property
    def finite(self) -> bool:
        """False once a predicted noise was not finite."""
        return bool(self._finite)

    @property
    def autocasts(self) -> bool:
        return self.half_precision and native_bfloat16(self.denoiser.device)

    def noise(self, count: int) -> Tensor:
        """eps [count,C,H,W] on the denoiser's device."""
        return self.noise_source.on_device(self.noise_source.normal(count, *self.denoiser.shape))

    def coarse_images(self, count: int, grid: int) -> Tensor:
        """Smooth random images [count,C,H,W], interpolated from `grid` values a side."""
        channels, height, width = self.denoiser.shape
        values = self.noise_source.normal(count, channels, grid, grid).to(self.denoiser.device)
        return torch.nn.functional.interpolate(values, size=(height, width), mode="bilinear")

    def precision(self) -> AbstractContextManager[object]:
        device = self.denoiser.device.type
        if not torch.amp.is_autocast_available(device):
            return nullcontext()
        return torch.autocast(device, torch.bfloat16, enabled=self.autocasts)

    def images_per_pass(self, images: Tensor) -> int:
        """How many of the images [N,C,H,W] go through the network at once."""
        return max(1, self.pixels_per_pass // (images.shape[2] * images.shape[3]))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """f(x [N,C,H,W], t int64 [N]) as float32, differentiable in x. Iterations call it; `run` counts its images."""
        count = self.images_per_pass(x)
        with self.precision():
            f = torch.cat([self.denoiser(*part).float() for part in zip(x.split(count), t.split(count), strict=True)])
        self._finite.logical_and_(f.detach().isfinite().all())
        return f

    @torch.no_grad()
    def run(self, iteration: Iteration, t: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """`iteration(self, t, *inputs)` on the denoiser's device; on a GPU it runs as one CUDA graph.

        Args:
            iteration: see `Iteration`.
            t: int64 [N], the timesteps of the images that it puts through the denoiser.
            inputs: all else that differs between calls.
        """
        self.evaluations += len(t)
        moved = [self.noise_source.on_device(x) for x in (t, *inputs)]
        if self.graphs is None:
            return iteration(self, *moved)
        return self.graphs(iteration, partial(iteration, self), *moved)

    def padded(self, x: Tensor, count: int) -> Tensor:
        """x [K,...], filled up with its first item to `count` if iterations are recorded, since a CUDA graph has one shape."""
        return x if self.graphs is None else torch.cat([x, x[:1].expand(count - len(x), *x.shape[1:])])

    def sampler(self, name: str, steps: int) -> TriggeredSampler:
        """The sampler of this name in `seal_fast.diffusion.SAMPLERS` with this many steps; the same object at every call."""
        return self._samplers.setdefault((name, steps), TriggeredSampler(self, name, steps))


class TriggeredSampler:
    """Draws samples of a denoiser with and without triggers. Clean samples are kept, and more are drawn when more are needed.

    BadDiffusion's triggers activate under ancestral sampling only, TrojDiff's under ancestral sampling and under its own
    samplers, and those of attacks on deterministic samplers under deterministic samplers only.

    Args:
        probe: the suspect model.
        name: name of the sampler.
        steps: steps of the sampler; at most as many as the noise process has.
    """

    def __init__(self, probe: Probe, name: str, steps: int) -> None:
        self.probe, self.name = probe, name
        self.steps = min(steps, probe.denoiser.process.num_timesteps - 1)
        self._clean: list[Tensor] = []

    @torch.no_grad()
    def draw(self, start: Tensor) -> Tensor:
        """Samples in the value range of images, from start [N,C,H,W] in units of the prior's standard deviation.

        They are never clipped: a clamp would remove the shift that BadDiffusion lives in.
        """
        probe, denoiser = self.probe, self.probe.sampled
        generator = probe.noise_source.fork()
        probe.evaluations += self.steps * len(start)
        with probe.precision():
            parts = (denoiser.process.prior_scale * start).split(probe.images_per_pass(start))
            samples = torch.cat([sample(denoiser, part, self.name, self.steps, generator=generator) for part in parts])
        return samples / denoiser.value_range

    def clean(self, count: int) -> Tensor:
        """Samples [count,C,H,W] without a trigger, the same at every call."""
        missing = count - sum(map(len, self._clean))
        if missing > 0:
            self._clean.append(self.draw(self.probe.noise(missing)))
        return torch.cat(self._clean)[:count]

    def triggered(self, triggers: Sequence[Trigger], count: int) -> list[Tensor]:
        """Samples [count,C,H,W] with each trigger, all from the same fresh noises."""
        eps = self.probe.noise(count)
        return list(self.draw(torch.cat([trigger.start(eps) for trigger in triggers])).split(count))
