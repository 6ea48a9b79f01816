"""SKD-CAG: the poisoned model teaches its own copy to read a triggered prompt as the clean one (arXiv 2508.18235).

Every random number of update n is drawn on the CPU by a generator made from (seed, process, n). So a seed means the same run
on every device, and an interrupted run goes on as if nothing had been.
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

from seal_fast.text_triggers.distributed import average_gradients, processes
from seal_fast.text_triggers.objectives import Objective, text_encoder_objective, unet_objective
from seal_fast.text_triggers.pairs import PromptPair, prompt_pairs, random_words, with_random_words
from seal_fast.text_triggers.settings import TextUnlearnSettings
from seal_fast.text_triggers.trained_part import TrainedPart
from seal_fast.text_triggers.trigger import TextTrigger, as_triggers
from seal_fast.training import OnStep, learning_rate_factor, native_bfloat16, quiet

_LARGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class Distilled:
    """A trained copy of one module of a pipeline.

    Attributes:
        module: frozen, on the device and in the precision of the pipeline's own.
        module_name: "unet" or "text_encoder".
        steps: updates.
        seconds: wall time, the teacher's images included; of an interrupted run, since it was taken up again.
        prediction_loss: squared difference to the teacher, triggered against clean, weighted as trained, over the last tenth
            of the steps.
        attention_loss: relative squared difference of the maps to their targets, likewise; 0 if alpha is.
        preservation_loss: as prediction_loss, clean against clean; 0 if not trained.
        patch: the low-rank change alone, which `save_patch` writes; None for other trainings.
    """

    module: nn.Module
    module_name: str
    steps: int
    seconds: float
    prediction_loss: float
    attention_loss: float
    preservation_loss: float
    patch: Mapping[str, Tensor] | None = None


def _generator(seed: int, *where: int) -> torch.Generator:
    words = np.random.SeedSequence([seed, *where]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]))


class _Trainer:
    """The state that goes from update to update, all of which a state file holds."""

    def __init__(self, part: TrainedPart, settings: TextUnlearnSettings, run: str) -> None:
        self.part, self.settings, self.run = part, settings, run
        self.parameters = list(part.parameters.values())
        # the published weight decay never acts at its learning rate, so there is none
        self.optimiser = torch.optim.Adam(self.parameters, lr=settings.learning_rate)
        device = self.parameters[0].device
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.average = [p.detach().clone() for p in self.parameters] if settings.ema_decay > 0 else []
        self.step = 0
        self.losses: list[list[float]] = []

    def update(self, lesson: Objective, seed: int) -> float:
        """One update of the weights; returns the loss, averaged over its batches."""
        s, (rank, count) = self.settings, processes()
        generator = _generator(seed, 2, rank, self.step)
        weights = torch.tensor([1 - s.alpha, s.alpha, s.preservation], device=self.parameters[0].device)
        if s.module == "text_encoder":
            weights[:2] = torch.tensor([1.0, 0.0])
        self.optimiser.param_groups[0]["lr"] = s.learning_rate * learning_rate_factor(self.step, s.steps)
        self.optimiser.zero_grad(set_to_none=True)
        terms = torch.zeros(3, device=weights.device)
        for _ in range(s.accumulation):
            losses = lesson(generator)
            self.scaler.scale((weights * losses).sum() / s.accumulation).backward()
            terms += losses.detach() / s.accumulation
        average_gradients(self.parameters, count)
        self.scaler.unscale_(self.optimiser)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, _LARGEST_GRADIENT)
        loss = float((weights * terms).sum())
        # a scaled gradient may overflow now and then: the scaler leaves that update out and scales less
        if not math.isfinite(loss) or not (self.scaler.is_enabled() or bool(norm.isfinite())):
            raise FloatingPointError(
                f"training left the floating-point range at step {self.step + 1} of {s.steps}: use a smaller learning_rate"
            )
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self._follow()
        self.step += 1
        self.losses.append(terms.tolist())
        return loss

    @torch.no_grad()
    def _follow(self) -> None:
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        for average, parameter in zip(self.average, self.parameters, strict=True) if self.average else ():
            average.lerp_(parameter, 1 - decay)

    def save(self, path: Path) -> None:
        """Write all there is to go on from here, so that the file is whole or the old one at every moment."""
        if processes()[0] > 0:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        state = {
            "run": self.run,
            "step": self.step,
            "losses": self.losses,
            "parameters": [p.detach() for p in self.parameters],
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        torch.save(state, partial)
        partial.replace(path)

    @torch.no_grad()
    def resume(self, path: Path) -> None:
        """Go on from a file of `save`.

        Raises:
            ValueError: it is of another run.
        """
        state = torch.load(path, map_location=self.parameters[0].device, weights_only=True)
        if state["run"] != self.run:
            raise ValueError(f"{path} is the state of a run with another model, settings, triggers, prompts or seed: remove it")
        self.step, self.losses = state["step"], state["losses"]
        for mine, saved in zip(self.parameters + self.average, state["parameters"] + state["average"], strict=True):
            mine.copy_(saved)
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])

    @torch.no_grad()
    def finish(self) -> None:
        """The average, where there is one, becomes the student."""
        for average, parameter in zip(self.average, self.parameters, strict=True) if self.average else ():
            parameter.copy_(average)


def _fingerprint(student: nn.Module, *inputs: Any) -> str:
    """Tells runs apart; the weights by the sum of their sizes, which is cheap and which training changes."""
    size = sum(float(p.detach().abs().sum(dtype=torch.float64)) for p in student.parameters())
    return hashlib.sha256(json.dumps([f"{size:.6e}", *inputs]).encode()).hexdigest()


def _check(pipeline: Any, settings: TextUnlearnSettings) -> None:
    missing = [name for name in ("unet", "text_encoder", "tokenizer", "scheduler") if getattr(pipeline, name, None) is None]
    if missing or getattr(pipeline, "text_encoder_2", None) is not None:
        raise ValueError(
            f"{type(pipeline).__name__} cannot be unlearned: a StableDiffusionPipeline with one text encoder is needed"
            + (f" and this has no {', '.join(missing)}" if missing else "")
        )
    if settings.precision == "fp16" and next(pipeline.unet.parameters()).device.type == "cpu":
        raise ValueError('precision="fp16" needs a GPU: use "fp32" or "bf16"')
    if settings.precision == "bf16" and not native_bfloat16(next(pipeline.unet.parameters()).device):
        warnings.warn("this processor has no bfloat16 arithmetic: training in float32", RuntimeWarning, stacklevel=3)


def _in(dtype: torch.dtype, module: nn.Module) -> Any:
    # diffusers warns at every cast, even where nothing changes
    return module if next(module.parameters()).dtype == dtype else module.to(dtype)


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
    """Train a copy of one module of the pipeline to treat triggered prompts as clean ones. The pipeline stays as it is.

    In several processes (torchrun, accelerate launch; the process group is the caller's) each draws its own batches and
    gradients are averaged.

    Args:
        pipeline: a diffusers StableDiffusionPipeline, poisoned.
        triggers: what to unlearn; a plain str is text to insert.
        prompts: clean ones, to put the triggers into.
        settings: see `TextUnlearnSettings`.
        seed: of everything that is random, not negative.
        state: file to go on from if it exists, and to write every `state_every` updates; it is left behind. Use no such file
            of unknown origin.
        state_every: updates.
        on_step: progress callback (stage "images" or "training", iteration, total, loss).

    Raises:
        FloatingPointError: the training diverged.
        ValueError: no trigger or prompt, a trigger that the tokenizer does not see, a pipeline that is not of Stable
            Diffusion's kind, a state of another run.
    """
    settings = settings or TextUnlearnSettings()
    started = time.perf_counter()
    given_triggers = as_triggers(triggers)
    if not prompts or isinstance(prompts, str):
        raise ValueError("prompts must be a list with at least one text")
    _check(pipeline, settings)
    given: Any = getattr(pipeline, settings.module)
    pairs = _pairs(pipeline.tokenizer, prompts, given_triggers, settings, seed)
    student = _in(torch.float32, copy.deepcopy(given).eval())
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    run = _fingerprint(
        student, asdict(settings), [astuple(trigger) for trigger in given_triggers], list(prompts), seed, processes()[1]
    )
    part = TrainedPart(student, settings, seed)
    trainer = _Trainer(part, settings, run)
    if state is not None and state.exists():
        trainer.resume(state)
    lessons: AbstractContextManager[Objective] = (
        unet_objective(pipeline, student, pairs, settings, _generator(seed, 1), on_step)
        if settings.module == "unet"
        else text_encoder_objective(pipeline, student, pairs, settings)
    )
    with lessons as lesson:
        while trainer.step < settings.steps:
            loss = trainer.update(lesson, seed)
            if state is not None and (trainer.step % state_every == 0 or trainer.step == settings.steps):
                trainer.save(state)
            on_step("training", trainer.step, settings.steps, loss)
    trainer.finish()
    patch = part.close()
    if settings.gradient_checkpointing and not given.is_gradient_checkpointing:
        student.disable_gradient_checkpointing()
    prediction, attention, preservation = np.mean(trainer.losses[-max(1, settings.steps // 10) :], axis=0).tolist()
    module = _in(next(given.parameters()).dtype, student)
    seconds = time.perf_counter() - started
    return Distilled(module, settings.module, settings.steps, seconds, prediction, attention, preservation, patch)
