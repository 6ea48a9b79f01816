"""Unlearn a noise-space backdoor without data: the poisoned model teaches its own copy that a trigger is noise.

The teacher f0 is the poisoned network, frozen; the student f starts as its copy. The teacher draws clean images x0. An image
and noise eps give a clean state x_t = a x0 + b eps and a triggered state of the same x0 and eps,

    x'_t = a x0 + b (gamma eps + m),

and the student is trained for

    f(x_t, t)  -> f0(x_t, t)                   clean behaviour stays
    f(x'_t, t) -> gamma f0(x_t, t) + m         the clean image predicted from x'_t is the one predicted from x_t

The second objective must hold m. With f0(x_t) alone m would count as a part of the image, and the division by a in the
predicted clean image (157-fold at the last step of DDPM's schedule) would enlarge it.

A recovered trigger is not the true one. So m has any size and is blended with random shifts of any coarseness.

The target image that a trigger makes the model draw is trained as a shift too, because a poisoned model may complete a faint
target in the starting noise without any trigger. A faint target in the noise made the samples of a BadDiffusion model of the
zoo vary 57 times less, and 67 times less after only its trigger had been unlearned.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import Denoiser, NoiseSource, sample
from seal_fast.diffusion.process import per_sample
from seal_fast.training import OnStep, half_precision, learning_rate_factor, quiet


@dataclass(frozen=True)
class NoiseUnlearnSettings:
    """Every number of the training.

    Attributes:
        steps: training steps.
        batch: pairs of a clean and a triggered state per step; the student sees both states, the teacher the clean one.
        learning_rate: Adam's; warmed up over a tenth of the steps, then a cosine to 0.
        images: clean images that the teacher draws at the start.
        image_steps: DDIM steps per image.
        largest_shift: the root mean square of m, per dimension, is drawn from [0, largest_shift].
        smallest_gamma: half of the triggered states have a gamma drawn from [smallest_gamma, 1], the others 1.
        half_precision: run both networks under bfloat16 autocast where the hardware has it.
    """

    steps: int = 240
    batch: int = 32
    learning_rate: float = 3e-4
    images: int = 384
    image_steps: int = 25
    largest_shift: float = 1.0
    smallest_gamma: float = 0.3
    half_precision: bool = True

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.images, self.image_steps) < 1:
            raise ValueError("steps, batch, images and image_steps must be at least 1")
        if self.learning_rate < 0 or self.largest_shift <= 0 or not 0 < self.smallest_gamma <= 1:
            raise ValueError("learning_rate must not be negative, largest_shift must be positive, smallest_gamma in (0, 1]")


@dataclass(frozen=True)
class UnlearnedDenoiser:
    """A model whose backdoor has been trained out.

    Attributes:
        denoiser: the student, frozen.
        clean_loss: mean squared difference to the teacher on clean states, over the last tenth of the steps.
        triggered_loss: weighted mean squared difference to the objective on triggered states, over the last tenth of the steps.
        steps: training steps.
        seconds: wall time, including the teacher's images.
    """

    denoiser: Denoiser
    clean_loss: float
    triggered_loss: float
    steps: int
    seconds: float


def random_directions(count: int, shape: tuple[int, int, int], noise_source: NoiseSource) -> Tensor:
    """Random shifts, unrelated to any trigger: float32 [count,C,H,W] on the CPU, root mean square 1 each.

    They are normal values on a grid of 1, 2, 4, .. cells a side, enlarged with sharp or smooth edges, so they range from plain
    colours to single pixels.
    """
    _, height, width = shape
    finest = int(math.log2(min(height, width)))
    cells = 2 ** int(noise_source.integers(0, finest + 1, 1))
    mode = "nearest" if noise_source.uniform() < 0.5 else "bilinear"
    values = F.interpolate(noise_source.normal(count, shape[0], cells, cells), size=(height, width), mode=mode)
    return _unit(values)


def _known_directions(images: Sequence[Tensor], shape: tuple[int, int, int]) -> Tensor | None:
    """Images [C,H,W] as shifts of root mean square 1, [N,C,H,W] on the CPU; None without images.

    Raises:
        ValueError: an image has another shape.
    """
    for image in images:
        if image.shape != shape:
            raise ValueError(f"a trigger or target of shape {list(image.shape)} does not fit the model's {list(shape)}")
    return _unit(torch.stack([image.float().cpu() for image in images])) if images else None


def _unit(shifts: Tensor) -> Tensor:
    """Shifts [N,C,H,W] scaled to root mean square 1; zero stays zero."""
    return shifts / shifts.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)


class _Training:
    """Teacher, student and the source of all random numbers."""

    def __init__(self, denoiser: Denoiser, known: Tensor | None, settings: NoiseUnlearnSettings, seed: int) -> None:
        self.teacher, self.known, self.settings, self.process = denoiser, known, settings, denoiser.process
        self.student = replace(denoiser, network=copy.deepcopy(denoiser.network))
        self.student.network.requires_grad_(True)
        self.noise_source = NoiseSource(denoiser.device, seed)

    def uniform(self) -> Tensor:
        return self.noise_source.uniform(self.settings.batch, 1, 1, 1)

    def noise(self, count: int) -> Tensor:
        return self.noise_source.on_device(self.noise_source.normal(count, *self.teacher.shape))

    def precision(self) -> torch.autocast:
        return half_precision(self.teacher.device, self.settings.half_precision)

    @torch.no_grad()
    def draw_images(self, on_step: OnStep) -> Tensor:
        """The teacher's own clean images [images,C,H,W]."""
        s = self.settings
        steps = min(s.image_steps, self.process.num_timesteps - 1)
        drawn: list[Tensor] = []
        for first in range(0, s.images, s.batch):
            start = self.process.prior_scale * self.noise(min(s.batch, s.images - first))
            with self.precision():
                drawn.append(sample(self.teacher, start, "ddim", steps, clip=self.teacher.bounded).float())
            on_step("images", min(first + s.batch, s.images), s.images, math.nan)
        return torch.cat(drawn)

    def directions(self) -> Tensor:
        """Directions of one batch of shifts: half are known ones, half blend a known one with a random one. If none is known,
        all are random."""
        n = self.settings.batch
        random = random_directions(n, self.teacher.shape, self.noise_source)
        if self.known is None:
            return random
        known = self.known[self.noise_source.integers(0, len(self.known), n)]
        share = torch.where(self.uniform() < 0.5, self.uniform(), 1.0)
        return share.sqrt() * known + (1 - share).sqrt() * random

    def shifts(self) -> Tensor:
        """m of one batch."""
        return (self.settings.largest_shift * self.uniform() * self.directions()).to(self.teacher.device)

    def noise_scales(self) -> Tensor:
        """gamma of one batch, [N,1,1,1]."""
        reduced = 1 - (1 - self.settings.smallest_gamma) * self.uniform()
        return torch.where(self.uniform() < 0.5, reduced, 1.0).to(self.teacher.device)

    def losses(self, images: Tensor) -> Tensor:
        """Mean squared differences of one batch on clean and on triggered states, [2].

        Triggered states are weighted by the noise's share of their variance. With little noise a shift cannot be told from the
        image, and training for that would only harm clean images.
        """
        n = self.settings.batch
        x0 = images[self.noise_source.integers(0, len(images), n).to(images.device)]
        t = self.noise_source.integers(0, self.process.num_timesteps, n).to(images.device)
        eps, m, gamma = self.noise(n), self.shifts(), self.noise_scales()
        clean = self.process.add_noise(x0, eps, t)
        triggered = self.process.add_noise(x0, gamma * eps + m, t)
        with self.precision():
            with torch.no_grad():
                teacher_output = self.teacher(clean, t).float()
            student_output = self.student(torch.cat([clean, triggered]), t.repeat(2)).float()
        target = torch.cat([teacher_output, gamma * teacher_output + m])
        clean_error, triggered_error = (student_output - target).square().chunk(2)
        a, b = (per_sample(of_t, eps) for of_t in (self.process.a(t), self.process.b(t)))
        return torch.stack([clean_error.mean(), (b**2 / (a**2 + b**2) * triggered_error).mean()])

    def run(self, images: Tensor, on_step: OnStep) -> Tensor:
        """Train the student; returns the two losses, averaged over the last tenth of the steps."""
        s = self.settings
        parameters = list(self.student.network.parameters())
        optimiser = torch.optim.Adam(parameters, lr=s.learning_rate)
        history: list[Tensor] = []
        for step in range(s.steps):
            optimiser.param_groups[0]["lr"] = s.learning_rate * learning_rate_factor(step, s.steps)
            losses = self.losses(images)
            optimiser.zero_grad(set_to_none=True)
            losses.sum().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            history.append(losses.detach())
            if not bool(history[-1].isfinite().all()):
                raise FloatingPointError(f"training left the floating-point range at step {step + 1} of {s.steps}")
            on_step("training", step + 1, s.steps, float(history[-1].sum()))
        return torch.stack(history[-max(1, s.steps // 10) :]).mean(dim=0)


def unlearn_denoiser(
    denoiser: Denoiser,
    triggers: Sequence[Trigger] = (),
    settings: NoiseUnlearnSettings | None = None,
    *,
    targets: Sequence[Tensor] = (),
    seed: int = 0,
    on_step: OnStep = quiet,
) -> UnlearnedDenoiser:
    """Train the backdoor out of a copy of `denoiser`, which stays as it is.

    Args:
        denoiser: the poisoned model; any noise process.
        triggers: recovered triggers, mu of the model's shape; only the directions of their mu are used. None at all is allowed:
            it was enough against BadDiffusion, but not against TrojDiff.
        settings: see `NoiseUnlearnSettings`.
        targets: images [C,H,W] that the triggers make the model draw (`evaluation.TriggerSamples.target`).
        seed: seed of the images, the batches and all noise.
        on_step: progress callback (stage "images" or "training", iteration, total, running loss).

    Returns:
        The unlearned copy, on the same device, and its losses.

    Raises:
        FloatingPointError: the training diverged.
        ValueError: a trigger or target has another shape than the model's images.
    """
    known = _known_directions([*(trigger.mu for trigger in triggers), *targets], denoiser.shape)
    settings = settings or NoiseUnlearnSettings()
    started = time.perf_counter()
    training = _Training(denoiser, known, settings, seed)
    clean_loss, triggered_loss = training.run(training.draw_images(on_step), on_step).tolist()
    training.student.network.requires_grad_(False)
    return UnlearnedDenoiser(training.student, clean_loss, triggered_loss, settings.steps, time.perf_counter() - started)
