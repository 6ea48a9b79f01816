"""SKD-CAG: the poisoned model is the teacher of its own copy, which learns to read a triggered prompt as the clean one.

Source: arXiv 2508.18235. Every random number of update n is drawn on the CPU by a generator made from (seed, rank, n). A seed
therefore gives the same run on every device, and an interrupted run resumes to the same weights.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seal_fast.checkpoints import CheckpointError
from seal_fast.checkpoints.errors import refusing
from seal_fast.io import write_atomically
from seal_fast.text_triggers.distributed import average_gradients, rank_and_world_size
from seal_fast.text_triggers.objectives import Objective, text_encoder_objective, unet_objective
from seal_fast.text_triggers.pairs import PromptPair, prompt_pairs, random_words, with_random_words
from seal_fast.text_triggers.settings import TextUnlearnSettings
from seal_fast.text_triggers.trained_part import TrainedPart
from seal_fast.text_triggers.trigger import TextTrigger, as_triggers
from seal_fast.training import OnStep, learning_rate_factor, native_bfloat16, quiet, update_average

MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Distilled:
    """A trained copy of one module of a pipeline.

    Attributes:
        module: the copy, frozen, on the device and in the precision of the pipeline's own module.
        module_name: "unet" or "text_encoder".
        steps: updates of the weights.
        seconds: wall time, including the teacher's images; for a resumed run, the time since it was resumed.
        prediction_loss: mean squared difference from the teacher on triggered prompts, weighted as in training, over the last
            tenth of the steps.
        attention_loss: relative squared difference of the attention maps from their targets, over the same steps; 0 if alpha
            is.
        preservation_loss: as prediction_loss, on clean prompts; 0 if preservation is.
        patch: the low-rank changes alone, which `save_patch` writes; None if other weights were trained.
    """

    module: nn.Module
    module_name: str
    steps: int
    seconds: float
    prediction_loss: float
    attention_loss: float
    preservation_loss: float
    patch: Mapping[str, Tensor] | None = None


def _generator(seed: int, *purpose: int) -> torch.Generator:
    """A generator on the CPU for each purpose: (0) prompt pairs, (1) the teacher's images, (2, rank, step) a batch."""
    words = np.random.SeedSequence([seed, *purpose]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]))


class _Trainer:
    """The state of a training between updates, all of which a state file holds."""

    def __init__(self, part: TrainedPart, settings: TextUnlearnSettings, run: str) -> None:
        self.part, self.settings, self.run = part, settings, run
        self.parameters = list(part.parameters.values())
        # no weight decay: at the published learning rate the published one has no effect
        self.optimiser = torch.optim.Adam(self.parameters, lr=settings.learning_rate)
        device = self.parameters[0].device
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.average = [p.detach().clone() for p in self.parameters] if settings.ema_decay > 0 else []
        self.step = 0
        self.losses: list[list[float]] = []

    def update(self, objective: Objective, seed: int) -> float:
        """Update the weights once; returns the loss, averaged over the batches of the update.

        Raises:
            FloatingPointError: the loss or a gradient is not finite.
        """
        s, (rank, world_size) = self.settings, rank_and_world_size()
        generator = _generator(seed, 2, rank, self.step)
        weights = torch.tensor([1 - s.alpha, s.alpha, s.preservation], device=self.parameters[0].device)
        if s.module == "text_encoder":
            weights[:2] = torch.tensor([1.0, 0.0])
        self.optimiser.param_groups[0]["lr"] = s.learning_rate * learning_rate_factor(self.step, s.steps)
        self.optimiser.zero_grad(set_to_none=True)
        terms = torch.zeros(3, device=weights.device)
        for _ in range(s.accumulation):
            losses = objective(generator)
            self.scaler.scale((weights * losses).sum() / s.accumulation).backward()
            terms += losses.detach() / s.accumulation
        average_gradients(self.parameters, world_size)
        self.scaler.unscale_(self.optimiser)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRADIENT_NORM)
        loss = float((weights * terms).sum())
        # a scaled gradient may overflow now and then: the scaler then skips the update and scales less
        if not math.isfinite(loss) or not (self.scaler.is_enabled() or bool(norm.isfinite())):
            raise FloatingPointError(
                f"training left the floating-point range at step {self.step + 1} of {s.steps}: use a smaller learning_rate"
            )
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.average:
            update_average(self.average, self.parameters, self.step, self.settings.ema_decay)
        self.step += 1
        self.losses.append(terms.tolist())
        return loss

    def save(self, path: Path) -> None:
        """Write everything that `resume` needs. At every moment the file is complete: either the old one or the new one."""
        if rank_and_world_size()[0] > 0:
            return
        state = {
            "run": self.run,
            "step": self.step,
            "losses": self.losses,
            "parameters": [p.detach() for p in self.parameters],
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        write_atomically(path, lambda temporary: torch.save(state, temporary))

    @torch.no_grad()
    def resume(self, path: Path) -> None:
        """Continue from a file of `save`.

        Raises:
            ValueError: the file belongs to another run, or is no such file.
        """
        try:
            with refusing(path, "no training state"):
                if not path.is_file():
                    raise CheckpointError(path, "not a regular file")
                state = torch.load(path, map_location="cpu", weights_only=True)
                same_run = state["run"] == self.run
                if same_run:
                    self._take_over(state)
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError | MemoryError | torch.OutOfMemoryError):
                # the state itself may be good
                raise error.__cause__ from None
            raise ValueError(f"{error}. Remove it, or name another file") from error
        if not same_run:
            raise ValueError(f"{path} is the state of a run with another model, settings, triggers, prompts or seed: remove it")

    def _take_over(self, state: dict[str, Any]) -> None:
        self.step, self.losses = state["step"], state["losses"]
        for own, saved in zip(self.parameters + self.average, state["parameters"] + state["average"], strict=True):
            own.copy_(saved)
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])

    @torch.no_grad()
    def finish(self) -> None:
        """Replace the student's weights by their moving average, if there is one."""
        for average, parameter in zip(self.average, self.parameters, strict=True) if self.average else ():
            parameter.copy_(average)

    def final_losses(self) -> tuple[float, float, float]:
        """Losses of prediction, attention and preservation, averaged over the last tenth of the steps."""
        prediction, attention, preservation = np.mean(self.losses[-max(1, self.settings.steps // 10) :], axis=0).tolist()
        return prediction, attention, preservation


def _fingerprint(student: nn.Module, *inputs: Any) -> str:
    """A digest that tells runs apart. For the weights it takes the sum of their magnitudes, which is cheap to compute."""
    size = sum(float(p.detach().abs().sum(dtype=torch.float64)) for p in student.parameters())
    return hashlib.sha256(json.dumps([f"{size:.6e}", *inputs]).encode()).hexdigest()


def _check(pipeline: Any, settings: TextUnlearnSettings) -> None:
    missing = [name for name in ("unet", "text_encoder", "tokenizer", "scheduler") if getattr(pipeline, name, None) is None]
    if missing or getattr(pipeline, "text_encoder_2", None) is not None:
        raise ValueError(
            f"{type(pipeline).__name__} cannot be unlearned: a StableDiffusionPipeline with one text encoder is needed"
            + (f" and this has no {', '.join(missing)}" if missing else "")
        )
    if getattr(pipeline.text_encoder.config, "use_attention_mask", False):
        raise ValueError("text encoders that mask the padding are not supported: Stable Diffusion's do not")
    device = next(pipeline.unet.parameters()).device
    if settings.precision == "fp16" and device.type == "cpu":
        raise ValueError('precision="fp16" needs a GPU: use "fp32" or "bf16"')
    if settings.precision == "bf16" and not native_bfloat16(device):
        warnings.warn("this processor has no bfloat16 arithmetic: training in float32", RuntimeWarning, stacklevel=3)


def _cast(module: nn.Module, dtype: torch.dtype) -> Any:
    # diffusers warns at every cast, even where nothing changes
    return module if next(module.parameters()).dtype == dtype else module.to(dtype)


def _copy(teacher: nn.Module, settings: TextUnlearnSettings) -> Any:
    """The student before its training, in float32."""
    student = _cast(copy.deepcopy(teacher).eval(), torch.float32)
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    return student


def _pairs(
    tokenizer: Any, prompts: Sequence[str], triggers: Sequence[TextTrigger], settings: TextUnlearnSettings, seed: int
) -> list[PromptPair]:
    generator = _generator(seed, 0)
    pairs = prompt_pairs(tokenizer, prompts, triggers, settings.positions, generator)
    if settings.target == "random-words" and settings.module == "unet":
        words = random_words(tokenizer)
        pairs = [with_random_words(pair, words, generator) for pair in pairs]
    return pairs


def distill(
    pipeline: Any,
    triggers: Sequence[TextTrigger | str],
    prompts: Sequence[str],
    settings: TextUnlearnSettings | None = None,
    *,
    seed: int = 0,
    state: Path | None = None,
    state_every: int = 100,
    on_step: OnStep = quiet,
) -> Distilled:
    """Train a copy of one module of the pipeline to read triggered prompts as clean ones. The pipeline itself is not changed.

    In a process group (of torchrun or accelerate launch, joined by the caller) each process draws its own batches, and
    gradients are averaged.

    Args:
        pipeline: a diffusers StableDiffusionPipeline, poisoned.
        triggers: what to unlearn; a plain str is text to insert.
        prompts: clean prompts, to put the triggers into.
        settings: see `TextUnlearnSettings`.
        seed: seed of all random numbers, not negative.
        state: file to resume from if it exists, and to write every `state_every` updates; it is kept. Give no such file of
            unknown origin.
        state_every: updates between two writes of the state.
        on_step: progress callback (stage "images" or "training", iteration, total, loss).

    Raises:
        FloatingPointError: the training diverged.
        ValueError: no trigger or prompt, a trigger that the tokenizer drops, a pipeline that is not like Stable Diffusion's, or
            a `state` that is of another run, or no such file.
    """
    settings = settings or TextUnlearnSettings()
    started = time.perf_counter()
    triggers = as_triggers(triggers)
    if not prompts or isinstance(prompts, str):
        raise ValueError("prompts must be a list with at least one text")
    _check(pipeline, settings)
    teacher: Any = getattr(pipeline, settings.module)
    pairs = _pairs(pipeline.tokenizer, prompts, triggers, settings, seed)
    student = _copy(teacher, settings)
    inputs = (asdict(settings), [astuple(trigger) for trigger in triggers], list(prompts), seed, rank_and_world_size()[1])
    part = TrainedPart(student, settings, seed)
    trainer = _Trainer(part, settings, _fingerprint(student, *inputs))
    if state is not None and state.exists():
        trainer.resume(state)
    with _objective(pipeline, student, pairs, settings, seed, on_step) as objective:
        _train(trainer, objective, seed, state, state_every, on_step)
    trainer.finish()
    patch = part.close()
    if settings.gradient_checkpointing and not teacher.is_gradient_checkpointing:
        student.disable_gradient_checkpointing()
    module = _cast(student, next(teacher.parameters()).dtype)
    prediction, attention, preservation = trainer.final_losses()
    seconds = time.perf_counter() - started
    return Distilled(module, settings.module, settings.steps, seconds, prediction, attention, preservation, patch)


def _objective(
    pipeline: Any, student: nn.Module, pairs: Sequence[PromptPair], settings: TextUnlearnSettings, seed: int, on_step: OnStep
) -> AbstractContextManager[Objective]:
    if settings.module == "unet":
        return unet_objective(pipeline, student, pairs, settings, _generator(seed, 1), on_step)
    return text_encoder_objective(pipeline, student, pairs, settings)


def _train(trainer: _Trainer, objective: Objective, seed: int, state: Path | None, state_every: int, on_step: OnStep) -> None:
    """Update the weights until the last step."""
    steps = trainer.settings.steps
    while trainer.step < steps:
        loss = trainer.update(objective, seed)
        if state is not None and (trainer.step % state_every == 0 or trainer.step == steps):
            trainer.save(state)
        on_step("training", trainer.step, steps, loss)
