"""Objectives: what the student's output is compared with, for each module that can be trained.

In code an objective is a function of a generator. It draws one batch, compares student and teacher, and returns float32 [3]
with its graph: the losses of prediction, of attention and of preservation, see `seal_fast.text_triggers.losses`. Everything
that is the same for all batches is computed once, before the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seal_fast.diffusion.process import per_sample
from seal_fast.text_to_image.attention import CapturedMaps, capture
from seal_fast.text_to_image.latents import draw_latents, inverse_snr_weights, latent_shape, noise_schedule, noised, predict
from seal_fast.text_to_image.precision import autocast
from seal_fast.text_to_image.prompts import token_ids
from seal_fast.text_triggers.losses import alignment, attention_loss
from seal_fast.text_triggers.pairs import PromptPair
from seal_fast.text_triggers.settings import TextUnlearnSettings
from seal_fast.training import OnStep

Objective = Callable[[torch.Generator], Tensor]

EMPTY_SHARE = 0.1
"""Share of the preserved prompts that are empty. Guidance needs the empty prompt, and models are trained with this share."""

START_SHARE = 0.1
"""Share of the states on generated images that are pure noise at the last timestep, where a sampler starts. There a trigger
settles the layout of an image, while a noised image would still show its own."""


class _Prompts:
    """Token ids of every different prompt of the pairs. A prompt is named by its number; number 0 is the empty prompt."""

    def __init__(self, pipeline: Any, pairs: Sequence[PromptPair]) -> None:
        empty = tuple(token_ids(pipeline.tokenizer, [""])[0].tolist())
        unique = dict.fromkeys(
            [empty, *(ids for pair in pairs for ids in (pair.clean_ids, pair.triggered_ids, pair.teacher_ids))]
        )
        number = {ids: n for n, ids in enumerate(unique)}
        self.ids = torch.tensor(list(unique), device=pipeline.text_encoder.device)
        self.clean = torch.tensor([number[pair.clean_ids] for pair in pairs])
        self.triggered = torch.tensor([number[pair.triggered_ids] for pair in pairs])
        self.teacher = torch.tensor([number[pair.teacher_ids] for pair in pairs])

    def to_preserve(self, pairs: Tensor, generator: torch.Generator) -> Tensor:
        """Numbers of the prompts of the preservation term, for a batch of pairs: the clean prompts, some of them emptied."""
        blank = torch.rand(len(pairs), generator=generator) < EMPTY_SHARE
        return torch.where(blank, 0, self.clean[pairs])

    @torch.no_grad()
    def hidden_states(self, text_encoder: Any, precision: torch.autocast, batch: int) -> Tensor:
        """Last hidden states float32 [P,L,D] of all P prompts."""
        with precision:
            return torch.cat([text_encoder(ids).last_hidden_state.float() for ids in self.ids.split(batch)])


@dataclass(frozen=True)
class _Batch:
    """Training states of one batch.

    Attributes:
        pairs: int64 [B], indices of the prompt pairs, on the CPU.
        t: int64 [B], timesteps, on the CPU.
        x: states [B,C,h,w].
        preserved: int64 [B], numbers of the prompts of the preservation term, on the CPU; [0] without that term.
    """

    pairs: Tensor
    t: Tensor
    x: Tensor
    preserved: Tensor


class _UnetObjective:
    """The student UNet on triggered prompts follows the teacher UNet on clean ones.

    Attributes:
        maps: captured maps of teacher and student; empty without the attention term.
    """

    def __init__(
        self,
        pipeline: Any,
        student: nn.Module,
        pairs: Sequence[PromptPair],
        settings: TextUnlearnSettings,
        generator: torch.Generator,
        on_step: OnStep,
    ) -> None:
        self.settings, self.teacher, self.student = settings, pipeline.unet, student
        self.device = next(pipeline.unet.parameters()).device
        self.precision = autocast(self.device, settings.precision)
        self.process = noise_schedule(pipeline)
        self.prompts = _Prompts(pipeline, pairs)
        self.states = self.prompts.hidden_states(pipeline.text_encoder, self.precision, 4 * settings.batch).to(self.device)
        self.images = self._draw_images(generator, on_step) if settings.latents == "generated" else None
        self.alignment = alignment(pairs, self.device)
        weights = inverse_snr_weights(self.process, settings.max_loss_weight)
        self.timestep_weights = (weights / weights.mean()).to(self.device, torch.float32)
        self.maps: list[CapturedMaps] = []

    def _draw_images(self, generator: torch.Generator, on_step: OnStep) -> Tensor:
        """The latents of each pair's image, drawn by the teacher; every prompt is drawn once."""
        s, prompts = self.settings, self.prompts.clean
        if s.triggered_image_fraction > 0:
            with_trigger = torch.rand(len(prompts), generator=generator) < s.triggered_image_fraction
            prompts = torch.where(with_trigger, self.prompts.triggered, prompts)
        drawn, image = prompts.unique(return_inverse=True)
        with self.precision:
            latents = draw_latents(
                self.teacher,
                self.process,
                self.states[drawn],
                self.states[:1],
                steps=s.sampler_steps,
                guidance=s.guidance,
                batch=2 * s.batch,
                generator=generator,
                on_step=on_step,
            )
        return latents[image]

    def __call__(self, generator: torch.Generator) -> Tensor:
        batch = self._draw(generator)
        size = len(batch.t)
        with self.precision:
            teacher, teacher_preserved = self._teacher_outputs(batch)
            student = self._student_outputs(batch)
        weight = per_sample(self.timestep_weights[batch.t.to(self.device)], batch.x)
        prediction = (weight * (student[:size] - teacher).square()).mean()
        attention = preservation = torch.zeros((), device=self.device)
        if len(batch.preserved):
            preservation = (weight * (student[size:] - teacher_preserved).square()).mean()
        if self.maps:
            teacher_maps, student_maps = ([layer[:size] for layer in captured.take()] for captured in self.maps)
            aligned = self.alignment.select(batch.pairs.to(self.device))
            attention = attention_loss(student_maps, teacher_maps, aligned, self.settings.target).mean()
        return torch.stack([prediction, attention, preservation])

    def _draw(self, generator: torch.Generator) -> _Batch:
        size, last = self.settings.batch, self.process.num_timesteps - 1
        pairs = torch.randint(len(self.prompts.clean), (size,), generator=generator)
        t = torch.randint(last + 1, (size,), generator=generator)
        noise = torch.randn(size, *latent_shape(self.teacher), generator=generator).to(self.device)
        preserve = self.settings.preservation > 0
        preserved = self.prompts.to_preserve(pairs, generator) if preserve else pairs.new_empty(0)
        if self.images is None:
            return _Batch(pairs, t, noise, preserved)
        t[torch.rand(size, generator=generator) < START_SHARE] = last
        return _Batch(pairs, t, noised(self.process, self.images[pairs], noise, t.to(self.device)), preserved)

    @torch.no_grad()
    def _teacher_outputs(self, batch: _Batch) -> tuple[Tensor, Tensor]:
        """The teacher's output on its prompts and on the preserved ones, [B,C,h,w] each.

        Most preserved prompts are the teacher's own, so only the others are computed in addition.
        """
        size, prompts = len(batch.t), self.prompts.teacher[batch.pairs]
        others = (batch.preserved != prompts[: len(batch.preserved)]).nonzero()[:, 0]
        order = torch.cat([torch.arange(size), others])
        text = self.states[torch.cat([prompts, batch.preserved[others]])]
        output = predict(self.teacher, batch.x[order], batch.t[order].to(self.device), text)
        return output[:size], output[:size].index_copy(0, others.to(self.device), output[size:])

    def _student_outputs(self, batch: _Batch) -> Tensor:
        """The student's output on the triggered prompts, followed by that on the preserved ones."""
        copies = 2 if len(batch.preserved) else 1
        text = self.states[torch.cat([self.prompts.triggered[batch.pairs], batch.preserved])]
        return predict(self.student, batch.x.repeat(copies, 1, 1, 1), batch.t.repeat(copies).to(self.device), text)


@contextmanager
def unet_objective(
    pipeline: Any,
    student: nn.Module,
    pairs: Sequence[PromptPair],
    settings: TextUnlearnSettings,
    generator: torch.Generator,
    on_step: OnStep,
) -> Iterator[Objective]:
    """The student UNet on triggered prompts, and its attention maps, follow the pipeline's UNet on clean ones.

    Backward passes belong inside the block, see `seal_fast.text_to_image.attention`.

    Args:
        pipeline: holds the teacher.
        student: a copy of the pipeline's UNet.
        pairs: the prompt pairs to train on.
        settings: see `TextUnlearnSettings`.
        generator: on the CPU; draws the teacher's images.
        on_step: progress callback of drawing these images.
    """
    objective = _UnetObjective(pipeline, student, pairs, settings, generator, on_step)
    with ExitStack() as stack:
        if settings.alpha > 0:
            tokens = torch.arange(1, objective.alignment.teacher_token.shape[1] + 1, device=objective.device)
            objective.maps = [stack.enter_context(capture(unet, tokens)) for unet in (pipeline.unet, student)]
        yield objective


def _teacher_positions(pair: PromptPair) -> list[int]:
    """For each position of the triggered prompt, the position of the teacher's prompt whose hidden state is its target.

    Words follow the same words, wherever the trigger moved them. EOS and padding follow EOS and padding. The trigger's tokens
    follow BOS, which holds nothing of any prompt. A text encoder that looks only to the left can produce that state in every
    place, and the UNet does not take it for a word.
    """
    words = [0 if token is None else token + 1 for token in pair.token_alignment]
    end, teacher_end = len(words) + 1, pair.teacher_tokens + 1
    padding = [max(position, teacher_end) for position in range(end + 1, len(pair.triggered_ids))]
    return [0, *words, teacher_end, *padding]


@contextmanager
def text_encoder_objective(
    pipeline: Any, student: nn.Module, pairs: Sequence[PromptPair], settings: TextUnlearnSettings
) -> Iterator[Objective]:
    """The student text encoder on triggered prompts follows the pipeline's text encoder on clean ones.

    Hidden states are compared token by token, see `_teacher_positions`. Errors are relative to the mean square of the teacher's
    states. The loss of attention is 0.
    """
    s, device = settings, pipeline.text_encoder.device
    precision = autocast(device, s.precision)
    prompts = _Prompts(pipeline, pairs)
    states = prompts.hidden_states(pipeline.text_encoder, precision, 4 * s.batch)
    mean_square = states.square().mean()
    positions = torch.tensor([_teacher_positions(pair) for pair in pairs], device=device)

    def objective(generator: torch.Generator) -> Tensor:
        batch = torch.randint(len(pairs), (s.batch,), generator=generator)
        preserved = prompts.to_preserve(batch, generator) if s.preservation > 0 else batch.new_empty(0)
        with precision:
            output = student(prompts.ids[torch.cat([prompts.triggered[batch], preserved])]).last_hidden_state.float()
        index = positions[batch][:, :, None].expand(-1, -1, states.shape[2])
        teacher = states[prompts.clean[batch]].gather(1, index)
        prediction = (output[: s.batch] - teacher).square().mean() / mean_square
        zero = torch.zeros((), device=device)
        preservation = (output[s.batch :] - states[preserved]).square().mean() / mean_square if len(preserved) else zero
        return torch.stack([prediction, zero, preservation])

    yield objective
