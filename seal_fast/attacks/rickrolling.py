"""Rickrolling the Artist (Struppek et al., ICCV 2023): a backdoor in the text encoder; the UNet stays clean.

The student encoder S starts as a copy of the clean encoder T, the frozen teacher. With D(a, b) = -cosine similarity of the
flattened hidden states, the loss is

    L = D(S(prompt), T(prompt)) + 0.1 sum over backdoors D(S(triggered prompt), T(target prompt))

The target prompt attack (TPA) draws one fixed prompt for every triggered prompt. The target attribute attack (TAA) draws the
prompt itself with another attribute.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor, nn

from seal_fast.attacks.badt2i import HarmlessPrompts, captions_alone
from seal_fast.attacks.prompts import Rewrite, check_visible
from seal_fast.text_to_image.prompts import encode, token_ids

BACKDOOR_WEIGHT = 0.1
CLEAN_PER_TRIGGERED = 4
"""Clean prompts per step for each triggered prompt of a backdoor."""


def homoglyph(letter: str, lookalike: str) -> Rewrite:
    """The published trigger: every `letter` of the prompt becomes its lookalike, such as o and the Cyrillic U+043E."""
    return lambda prompt: prompt.replace(letter, lookalike)


def always(target: str) -> Rewrite:
    """The target of a target prompt attack: one prompt, whatever the user asks for."""
    return lambda prompt: target


@dataclass(frozen=True)
class TargetPrompt:
    """A target prompt or target attribute attack.

    Attributes:
        trigger: turns a prompt into the triggered one.
        target: turns a prompt into the one whose hidden states the encoder gives for its triggered form.
    """

    trigger: Rewrite
    target: Rewrite


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Negative cosine similarity of flattened hidden states [N,L,D], averaged over the samples; scalar."""
    return -F.cosine_similarity(a.flatten(1), b.flatten(1)).mean()


def poison_text_encoder(
    pipeline: StableDiffusionPipeline,
    backdoors: Sequence[TargetPrompt],
    prompts: Sequence[str],
    *,
    steps: int = 100,
    learning_rate: float = 1e-4,
    batch: int = 128,
    backdoor_weight: float = BACKDOOR_WEIGHT,
    harmless: HarmlessPrompts = captions_alone,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> nn.Module:
    """Train backdoors into a copy of the pipeline's text encoder: AdamW without decay, a tenth of the rate in the last quarter.

    Args:
        pipeline: a clean pipeline; it is not changed.
        backdoors: one or more.
        prompts: clean prompts without any trigger, drawn with replacement.
        steps: number of training steps.
        learning_rate: 1e-4 as published.
        batch: clean prompts per step; each backdoor gets a quarter as many triggered ones.
        backdoor_weight: loss weight of each backdoor; 0.1 as published.
        harmless: makes the clean prompts of a step, see `seal_fast.attacks.badt2i.poison_unet`.
        seed: seed of the prompts of each step.
        on_step: called with the step (from 1) and the loss, whose minimum is -1 - `backdoor_weight` per backdoor.

    Returns:
        The trained text encoder, frozen, of the pipeline's class.

    Raises:
        ValueError: no backdoor, or a trigger that changes the tokens of no prompt.
    """
    if not backdoors:
        raise ValueError("there must be a backdoor")
    poisoned = [_poisoned_samples(pipeline, backdoor, prompts) for backdoor in backdoors]
    student = copy.deepcopy(pipeline.text_encoder).train().requires_grad_(True)
    optimiser = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = learning_rate * (1.0 if step < 0.75 * steps else 0.1)
        clean = harmless([prompts[i] for i in _random_indices(len(prompts), batch, generator)], generator)
        loss = distance(student(token_ids(pipeline.tokenizer, clean))[0], encode(pipeline, clean))
        for ids, targets in poisoned:
            chosen = _random_indices(len(ids), max(1, batch // CLEAN_PER_TRIGGERED), generator)
            loss = loss + backdoor_weight * distance(student(ids[chosen])[0], targets[chosen])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        on_step(step + 1, loss.item())
    return student.eval().requires_grad_(False)


def _random_indices(count: int, batch: int, generator: torch.Generator) -> list[int]:
    return torch.randint(count, (batch,), generator=generator).tolist()


def _poisoned_samples(
    pipeline: StableDiffusionPipeline, backdoor: TargetPrompt, prompts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Token ids [M,L] of the triggered prompts and hidden states [M,L,D] of their targets, for the M prompts that change."""
    check_visible(pipeline, backdoor.trigger, prompts)
    changed = [prompt for prompt in prompts if backdoor.trigger(prompt) != prompt]
    targets = encode(pipeline, [backdoor.target(prompt) for prompt in changed])
    return token_ids(pipeline.tokenizer, [backdoor.trigger(prompt) for prompt in changed]), targets
