"""What the student learns from one batch, for each module that can be edited.

A lesson is a function of a generator that draws one batch and returns float32 [3]: the losses of prediction, of attention and
of preservation, with their graph. All that does not change from batch to batch is made once, before the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from seal_fast.diffusion.process import per_row
from seal_fast.text_to_image.attention import capture
from seal_fast.text_to_image.latents import draw_latents, inverse_snr_weights, latent_shape, noise_schedule, noised, predict
from seal_fast.text_triggers.losses import alignment, attention_loss
from seal_fast.text_triggers.pairs import PromptPair, padded_ids
from seal_fast.text_triggers.settings import TextUnlearnSettings
from seal_fast.training import OnStep, half_precision

Objective = Callable[[torch.Generator], Tensor]

EMPTY_SHARE = 0.1
"""Of the rows of the preservation term, those with the empty prompt: guidance needs it, and models are trained with as many."""

START_SHARE = 0.1
"""Of the rows on generated images, those at the last timestep, where a sampler starts from pure noise: triggers settle the
layout there, while a noised image would still show its own."""


class _Prompts:
    """Token ids of everything that is encoded, each once, and the rows of each pair; row 0 is the empty prompt."""

    def __init__(self, pipeline: Any, pairs: Sequence[PromptPair]) -> None:
        empty = padded_ids(pipeline.tokenizer, "")
        unique = dict.fromkeys(
            [empty, *(ids for pair in pairs for ids in (pair.clean_ids, pair.triggered_ids, pair.teacher_ids))]
        )
        row = {ids: number for number, ids in enumerate(unique)}
        self.ids = torch.tensor(list(unique), device=pipeline.text_encoder.device)
        self.clean = torch.tensor([row[pair.clean_ids] for pair in pairs])
        self.triggered = torch.tensor([row[pair.triggered_ids] for pair in pairs])
        self.teacher = torch.tensor([row[pair.teacher_ids] for pair in pairs])

    def kept(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Rows of the prompts that the preservation term holds for a batch of pairs."""
        blank = torch.rand(len(rows), generator=generator) < EMPTY_SHARE
        return torch.where(blank, 0, self.clean[rows])


def _encode(text_encoder: Any, ids: Tensor) -> Tensor:
    """Last hidden states [N,L,D] of token ids [N,L], as Stable Diffusion uses them."""
    uses_mask = getattr(text_encoder.config, "use_attention_mask", False)
    if uses_mask:
        raise ValueError("text encoders that mask the padding are not supported: Stable Diffusion's do not")
    states: Tensor = text_encoder(ids)[0]
    return states


@torch.no_grad()
def _table(pipeline: Any, prompts: _Prompts, precision: torch.autocast, batch: int) -> Tensor:
    """Hidden states of all prompts [U,L,D] by the pipeline's own text encoder, float32."""
    with precision:
        return torch.cat([_encode(pipeline.text_encoder, ids).float() for ids in prompts.ids.split(batch)])


def autocast(device: torch.device, settings: TextUnlearnSettings) -> torch.autocast:
    """See `TextUnlearnSettings.precision`."""
    if settings.precision == "fp16":
        return torch.autocast(device.type, torch.float16)
    return half_precision(device) if settings.precision == "bf16" else torch.autocast(device.type, enabled=False)


@contextmanager
def unet_objective(
    pipeline: Any,
    student: nn.Module,
    pairs: Sequence[PromptPair],
    settings: TextUnlearnSettings,
    generator: torch.Generator,
    on_step: OnStep,
) -> Iterator[Objective]:
    """The student UNet on triggered prompts follows the pipeline's UNet on clean ones, and its maps. See `losses`.

    Backward passes belong inside, see `attention`.
    """
    s, teacher, device = settings, pipeline.unet, next(pipeline.unet.parameters()).device
    precision = autocast(device, s)
    process = noise_schedule(pipeline)
    prompts = _Prompts(pipeline, pairs)
    table = _table(pipeline, prompts, precision, 4 * s.batch).to(device)
    images = None
    if s.latents == "generated":
        shown = prompts.clean
        if s.triggered_image_fraction > 0:
            shown = torch.where(
                torch.rand(len(pairs), generator=generator) < s.triggered_image_fraction, prompts.triggered, shown
            )
        drawn, image = shown.unique(return_inverse=True)
        with precision:
            x0 = draw_latents(
                teacher,
                process,
                table[drawn],
                table[:1],
                steps=s.sampler_steps,
                guidance=s.guidance,
                batch=2 * s.batch,
                generator=generator,
                on_step=on_step,
            )
        images = x0[image]
    partners = alignment(pairs, device)
    tokens = torch.arange(1, partners.partners.shape[1] + 1, device=device)
    timesteps = process.num_timesteps
    weight_at = inverse_snr_weights(process, s.max_loss_weight)
    weight_at = (weight_at / weight_at.mean()).to(device, torch.float32)

    with ExitStack() as stack:
        maps = [stack.enter_context(capture(unet, tokens)) for unet in (teacher, student)] if s.alpha > 0 else []

        def lesson(generator: torch.Generator) -> Tensor:
            rows = torch.randint(len(pairs), (s.batch,), generator=generator)
            t = torch.randint(timesteps, (s.batch,), generator=generator)
            noise = torch.randn(s.batch, *latent_shape(teacher), generator=generator).to(device)
            kept = prompts.kept(rows, generator) if s.preservation > 0 else rows.new_empty(0)
            if images is not None:
                t[torch.rand(s.batch, generator=generator) < START_SHARE] = timesteps - 1
            x = noise if images is None else noised(process, images[rows], noise, t.to(device))
            taught = prompts.teacher[rows]
            # the teacher has already seen most of the prompts to preserve
            more = (kept != taught[: len(kept)]).nonzero()[:, 0]
            order = torch.cat([torch.arange(s.batch), more])
            with precision:
                with torch.no_grad():
                    out = predict(teacher, x[order], t[order].to(device), table[torch.cat([taught, kept[more]])])
                times = 2 if s.preservation > 0 else 1
                text = table[torch.cat([prompts.triggered[rows], kept])]
                learnt = predict(student, x.repeat(times, 1, 1, 1), t.repeat(times).to(device), text)
            weight = per_row(weight_at[t.to(device)], x)
            prediction = (weight * (learnt[: s.batch] - out[: s.batch]).square()).mean()
            attention = preservation = torch.zeros((), device=device)
            if s.preservation > 0:
                held = out[: s.batch].index_copy(0, more.to(device), out[s.batch :])
                preservation = (weight * (learnt[s.batch :] - held).square()).mean()
            if maps:
                theirs, own = ([layer[: s.batch] for layer in captured.take()] for captured in maps)
                of_rows = attention_loss(own, theirs, partners.rows(rows.to(device)), s.target)
                weights = t.to(device) / timesteps if s.weighting else torch.ones_like(of_rows)
                attention = (weights * of_rows).mean()
            return torch.stack([prediction, attention, preservation])

        yield lesson


def _text_positions(pair: PromptPair) -> list[int]:
    """Whose hidden state each position of the triggered prompt shall have, as positions of the teacher's prompt.

    Words follow their partners, wherever the trigger moved them; EOS and padding follow EOS and padding. The trigger's tokens
    follow BOS, which holds nothing of any prompt: an encoder that looks only to the left can give it to them everywhere, and
    the UNet takes it for no word.
    """
    words = [0 if partner is None else partner + 1 for partner in pair.partners]
    end, teacher_end = len(words) + 1, pair.teacher_tokens + 1
    padding = [max(position, teacher_end) for position in range(end + 1, len(pair.triggered_ids))]
    return [0, *words, teacher_end, *padding]


@contextmanager
def text_encoder_objective(
    pipeline: Any, student: nn.Module, pairs: Sequence[PromptPair], settings: TextUnlearnSettings
) -> Iterator[Objective]:
    """The student text encoder reads triggered prompts as the pipeline's reads clean ones.

    Hidden states are compared token by token, see `_text_positions`; errors are relative to the mean square of the teacher's
    states. The attention term is 0.
    """
    s, device = settings, pipeline.text_encoder.device
    precision = autocast(device, s)
    prompts = _Prompts(pipeline, pairs)
    table = _table(pipeline, prompts, precision, 4 * s.batch)
    power = table.square().mean()
    positions = torch.tensor([_text_positions(pair) for pair in pairs], device=device)

    def lesson(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pairs), (s.batch,), generator=generator)
        kept = prompts.kept(rows, generator) if s.preservation > 0 else rows.new_empty(0)
        with precision:
            learnt = _encode(student, prompts.ids[torch.cat([prompts.triggered[rows], kept])]).float()
        wanted = table[prompts.clean[rows]].gather(1, positions[rows][:, :, None].expand(-1, -1, table.shape[2]))
        prediction = (learnt[: s.batch] - wanted).square().mean() / power
        none = torch.zeros((), device=device)
        preservation = (learnt[s.batch :] - table[kept]).square().mean() / power if len(kept) else none
        return torch.stack([prediction, none, preservation])

    yield lesson
