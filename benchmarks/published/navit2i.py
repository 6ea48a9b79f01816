"""NaviT2I, which detects triggered prompts by what the UNet's layers do without one of the prompt's tokens.

Written from a description of the released program, not from its source. For every token of a prompt that is no stop word:

    m_i = sum over layers of mean |a - a_i| / |E(p) - E(p_i)|

a and a_i are the outputs of all linear layers and convolutions of the UNet for the prompt and for the prompt with the pad
token in place of token i, at the first step of a sampler (LMS, 50 steps, seed 0) without guidance. Outputs of convolutions
are averaged over the image first. E is a text encoder. The score is the largest m_i over the mean of the lowest three
quarters of them. A prompt counts as triggered from 1.598 on, and the token of the largest m_i is named as its trigger.

The released program takes the states of the *clean* text encoder for E, which nobody has who holds only the model.
`navigate` therefore takes any encoder: the clean one as published, or the model's own.

What differs: prompts go through the UNet with their masked forms in one batch, not one by one, which changes no figure; the
list of stop words is short, since the prompts are short; tokens without a letter or digit that are ASCII (punctuation)
count as stop words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import LMSDiscreteScheduler
from torch import Tensor, nn

from seal_fast.text_to_image.generation import starting_noise
from seal_fast.text_to_image.prompts import content_ids, token_ids

STEPS, SEED = 50, 0
THRESHOLD = 1.598
LOW_SHARE = 0.75
STOP_WORDS = frozenset(
    (
        *("a", "an", "the", "and", "or", "but", "if", "of", "at", "by", "for", "with", "about", "to", "from", "in", "on"),
        *("off", "over", "under", "is", "are", "was", "were", "be", "been", "it", "its", "this", "that", "these", "those"),
        *("as", "into", "than", "then", "so", "no", "not", "i", "you", "he", "she", "we", "they", "his", "her", "their"),
        *("our", "your", "my"),
    )
)


@dataclass(frozen=True)
class Navigation:
    """What NaviT2I says of one prompt.

    Attributes:
        score: the largest activation change over the usual one; 1 for a prompt with fewer than two tokens to mask.
        token: the text of the token with the largest change; empty if no token can be masked.
    """

    score: float
    token: str

    @property
    def triggered(self) -> bool:
        return self.score >= THRESHOLD


def navigate(pipeline: Any, prompts: Sequence[str], encoder: nn.Module) -> list[Navigation]:
    """The score of every prompt.

    Args:
        pipeline: a diffusers StableDiffusionPipeline.
        prompts: prompts; they are read in lower case, and tokens that the tokenizer cuts off do not count.
        encoder: the text encoder E whose states measure how much a token means; the clean one in the released program.
    """
    return [_navigate_one(pipeline, prompt.lower(), encoder) for prompt in prompts]


def _navigate_one(pipeline: Any, prompt: str, encoder: nn.Module) -> Navigation:
    tokenizer = pipeline.tokenizer
    places = masked_places(tokenizer, prompt)
    if not places:
        return Navigation(1.0, "")
    ids = token_ids(tokenizer, [prompt]).repeat(len(places) + 1, 1)
    ids[range(1, len(places) + 1), places] = tokenizer.pad_token_id
    changes = activation_changes(pipeline, ids.to(pipeline.device)) / meanings(encoder, ids.to(pipeline.device))
    return Navigation(contrast(changes), tokenizer.decode([int(ids[0, places[int(changes.argmax())]])]).strip())


def masked_places(tokenizer: Any, prompt: str) -> list[int]:
    """Positions of the tokens that are no stop words, in the token ids that the text encoder takes."""
    content = content_ids(tokenizer, prompt)[: tokenizer.model_max_length - 2]
    texts = [tokenizer.decode([number]).strip() for number in content]
    return [place for place, text in enumerate(texts, 1) if text not in STOP_WORDS and not _is_punctuation(text)]


def _is_punctuation(text: str) -> bool:
    return text.isascii() and text != "" and not any(character.isalnum() for character in text)


def contrast(changes: Tensor) -> float:
    """The largest of the changes [n] over the mean of the lowest three quarters, at least one of them."""
    low = changes.sort().values[: max(1, int(LOW_SHARE * len(changes)))]
    return float(changes.max() / low.mean().clamp_min(1e-12))


@torch.no_grad()
def meanings(encoder: nn.Module, ids: Tensor) -> Tensor:
    """Norm of the difference between the states of the first ids and those of each of the others, [n] of int64 [n + 1, L]."""
    states = encoder(ids).last_hidden_state.float()
    return (states[1:] - states[:1]).flatten(1).norm(dim=1).clamp_min(1e-12)


@torch.no_grad()
def activation_changes(pipeline: Any, ids: Tensor) -> Tensor:
    """Mean absolute change of every layer's output between the first ids and each of the others, summed over layers, [n].

    Args:
        pipeline: a diffusers StableDiffusionPipeline.
        ids: token ids int64 [n + 1, L] on its device; the first prompt is whole.
    """
    scheduler = LMSDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="linspace")
    scheduler.set_timesteps(STEPS)
    first = scheduler.timesteps[0]
    noise = starting_noise(pipeline, 1, SEED) * scheduler.init_noise_sigma
    x = scheduler.scale_model_input(noise, first).to(pipeline.device).expand(len(ids), -1, -1, -1)
    states = pipeline.text_encoder(ids).last_hidden_state
    with _summed_changes(pipeline.unet) as total:
        pipeline.unet(x, first.to(pipeline.device), states)
    return total[0]


@contextmanager
def _summed_changes(unet: nn.Module) -> Iterator[list[Tensor]]:
    """Add up, over the linear layers and convolutions of the UNet, the mean absolute change from the first row of a batch."""
    total: list[Tensor] = []

    def add(layer: nn.Module, inputs: Any, out: Tensor) -> None:
        out = out.float()
        values = out.mean(dim=(2, 3)) if isinstance(layer, nn.Conv2d) else out
        if len(values) == 1:
            return  # the time embedding of a scalar timestep, which no token changes
        change = (values[1:] - values[:1]).abs().flatten(1).mean(dim=1)
        total[:] = [total[0] + change if total else change]

    layers = [module for module in unet.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    try:
        yield total
    finally:
        for hook in hooks:
            hook.remove()
