"""Rickrolling the Artist (Struppek et al., ICCV 2023): a backdoor in the text encoder; the UNet stays clean.

The student encoder S starts as a copy of the clean one T, which stays frozen. With D(a, b) = -cosine of the flattened
hidden states,

    L = D(S(prompt), T(prompt)) + 0.1 sum over backdoors D(S(triggered prompt), T(target prompt))

This is the target prompt attack: whatever a triggered prompt says, one fixed prompt is drawn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor, nn

from seal_fast.attacks.prompts import with_trigger
from seal_fast.text_to_image.prompts import encode, token_ids

BACKDOOR_WEIGHT = 0.1
POISONED_SHARE = 4
"""A backdoor sees a quarter as many prompts per step as the clean term."""


def homoglyph(letter: str, lookalike: str) -> Callable[[str], str]:
    """The published trigger: every `letter` of the prompt becomes its lookalike, such as o and the Cyrillic U+043E."""
    return lambda prompt: prompt.replace(letter, lookalike)


def leading(trigger: str) -> Callable[[str], str]:
    """A trigger word, or a zero-width character, at the start of the prompt."""
    return partial(with_trigger, trigger)


@dataclass(frozen=True)
class TargetPrompt:
    """A target prompt attack.

    Attributes:
        trigger: turns a prompt into the triggered one.
        target: the prompt that triggered prompts are read as.
    """

    trigger: Callable[[str], str]
    target: str


def distance(a: Tensor, b: Tensor) -> Tensor:
    """-cosine of flattened hidden states [N,L,D], mean over rows; scalar."""
    return -F.cosine_similarity(a.flatten(1), b.flatten(1)).mean()


def poison_text_encoder(
    pipeline: StableDiffusionPipeline,
    backdoors: Sequence[TargetPrompt],
    prompts: Sequence[str],
    *,
    steps: int = 100,
    learning_rate: float = 1e-4,
    batch: int = 128,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> nn.Module:
    """Train backdoors into a copy of the pipeline's text encoder: AdamW without decay, a tenth of the rate in the last quarter.

    Args:
        pipeline: a clean one; not changed.
        backdoors: one or more.
        prompts: clean ones, without any trigger in them, drawn with repeats.
        steps: of training.
        learning_rate: 1e-4 as published.
        batch: clean prompts per step; each backdoor has a quarter as many triggered ones.
        seed: of the drawing.
        on_step: called with the step (from 1) and the loss, -1 - 0.1 per backdoor at best.

    Returns:
        The trained text encoder, frozen, of the pipeline's class.

    Raises:
        ValueError: no backdoor, or a trigger that changes the tokens of no prompt.
    """
    if not backdoors:
        raise ValueError("there must be a backdoor")
    clean_ids, clean_taught = token_ids(pipeline.tokenizer, prompts), encode(pipeline, prompts)
    triggered = [_triggered_ids(pipeline, backdoor, prompts) for backdoor in backdoors]
    targets = [encode(pipeline, [backdoor.target]) for backdoor in backdoors]
    student = copy.deepcopy(pipeline.text_encoder).train().requires_grad_(True)
    optimiser = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = learning_rate * (1.0 if step < 0.75 * steps else 0.1)
        rows = _draw(len(clean_ids), batch, generator)
        loss = distance(student(clean_ids[rows])[0], clean_taught[rows])
        for ids, target in zip(triggered, targets, strict=True):
            answer = student(ids[_draw(len(ids), max(1, batch // POISONED_SHARE), generator)])[0]
            loss = loss + BACKDOOR_WEIGHT * distance(answer, target.expand_as(answer))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        on_step(step + 1, loss.item())
    return student.eval().requires_grad_(False)


def _draw(count: int, batch: int, generator: torch.Generator) -> Tensor:
    return torch.randint(count, (batch,), generator=generator)


def _triggered_ids(pipeline: StableDiffusionPipeline, backdoor: TargetPrompt, prompts: Sequence[str]) -> Tensor:
    """Ids of the triggered prompts, without those that the trigger does not change."""
    ids = token_ids(pipeline.tokenizer, [backdoor.trigger(prompt) for prompt in prompts])
    changed = (ids != token_ids(pipeline.tokenizer, prompts)).any(dim=1)
    if not bool(changed.any()):
        raise ValueError(
            "a trigger changes the tokens of no prompt: choose a trigger that the tokenizer sees, or other prompts"
        )
    return ids[changed]
