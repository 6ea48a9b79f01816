"""Train a text encoder so that its hidden states tell which rare tokens a prompt has, as CLIP's do.

An encoder that was trained on captions alone gives nearly the same states for all rare tokens (0.7 apart, the words of captions
10). No UNet could then tell a trigger from other rare tokens: a patch had an attack success of 3%. Here the states follow

    rare token            f(teacher + A e + B e of the token before)
    EOS and padding       f(teacher + C applied to the sum of the prompt's e)
    words of captions     teacher

with e the embedding row, f the scaling to the usual norm, and A, B, C random maps into directions that captions hardly use, so
that the UNet's response to captions stays as it was.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor

from seal_fast.attacks.optimisation import gradient_step
from seal_fast.text_to_image.prompts import encode, token_ids
from seal_fast.zoo.captioned import random_scenes
from seal_fast.zoo.train import warmup_cosine_factor
from seal_fast.zoo.train_text_to_image import STYLE_SHARE, CaptionOf, OnStep

USED_DIRECTIONS = 32
"""Principal directions of the captions' states that stay free of rare tokens."""
OWN_NORM, PREVIOUS_NORM, SENTENCE_NORM = 8.0, 8.0, 4.0
"""Norms of what A, B and C add; the states have norm 7.6."""
RARE_WEIGHT = 10.0
"""Loss weight of the positions of rare tokens, which are few."""
STEPS, BATCH, RATE = 2500, 48, 4e-3


@dataclass(frozen=True)
class _Identity:
    """What is added to the teacher's states: rows [V,D] per token, 0 for tokens that are not rare; the states' norm."""

    own: Tensor
    previous: Tensor
    sentence: Tensor
    norm: float

    def target(self, states: Tensor, ids: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Target states [N,L,D] for the teacher's states and token ids [N,L], and which tokens are rare, bool [N,L]."""
        rare = self.own[ids].norm(dim=-1) > 0
        added = self.own[ids]
        added[:, 1:] += torch.where(rare[:, 1:, None], self.previous[ids[:, :-1]], 0.0)
        total = self.sentence[ids].sum(dim=1)
        length = total.norm(dim=1, keepdim=True)
        total = torch.where(length > 0, total / length.clamp_min(1e-6) * SENTENCE_NORM, 0.0)
        added = torch.where((ids == end)[..., None], total[:, None], added)
        changed = added.norm(dim=-1, keepdim=True) > 0
        moved = states + added
        return torch.where(changed, moved / moved.norm(dim=-1, keepdim=True) * self.norm, states), rare


@torch.no_grad()
def _identity(pipeline: StableDiffusionPipeline, rare: Tensor, generator: torch.Generator) -> _Identity:
    captions = [scene.caption for scene in random_scenes(400, generator, STYLE_SHARE)]
    states = encode(pipeline, captions).flatten(0, 1)
    mean = states.mean(dim=0)
    free = torch.linalg.svd(states - mean, full_matrices=False).Vh[USED_DIRECTIONS:]
    unit = mean / mean.norm()
    free = free - (free @ unit)[:, None] * unit
    rows = pipeline.text_encoder.get_input_embeddings().weight

    def mapped(norm: float) -> Tensor:
        image = rows @ torch.randn(rows.shape[1], len(free), generator=generator) @ free
        return torch.where(rare[:, None], image / image.norm(dim=1, keepdim=True) * norm, 0.0)

    return _Identity(mapped(OWN_NORM), mapped(PREVIOUS_NORM), mapped(SENTENCE_NORM), float(states.norm(dim=1).mean()))


def teach_identity(
    pipeline: StableDiffusionPipeline, rare: Tensor, caption: CaptionOf, *, seed: int, on_step: OnStep, steps: int = STEPS
) -> None:
    """Train the text encoder in place, but for its embedding table.

    Args:
        pipeline: its encoder is the teacher too.
        rare: which tokens are rare, bool [V].
        caption: draws captions with rare strings.
        seed: seed of the maps, captions and strings.
        on_step: called with the step (from 1) and its loss.
        steps: steps of Adam.
    """
    generator = torch.Generator().manual_seed(seed)
    tokenizer: Any = pipeline.tokenizer
    identity = _identity(pipeline, rare, generator)
    encoder, teacher = pipeline.text_encoder, copy.deepcopy(pipeline.text_encoder)
    encoder.train().requires_grad_(True).get_input_embeddings().weight.requires_grad_(False)
    optimiser = torch.optim.Adam([parameter for parameter in encoder.parameters() if parameter.requires_grad], lr=RATE)
    for step in range(steps):
        scenes = random_scenes(BATCH, generator, STYLE_SHARE)
        ids = token_ids(tokenizer, [caption(scene, generator) for scene in scenes])
        with torch.no_grad():
            target, is_rare = identity.target(teacher(ids).last_hidden_state, ids, tokenizer.eos_token_id)
        weight = torch.where(is_rare, RARE_WEIGHT, 1.0)[..., None]
        loss = (weight * (encoder(ids).last_hidden_state - target).square()).mean()
        gradient_step(optimiser, loss, RATE * warmup_cosine_factor(step, steps))
        on_step(step + 1, loss.item())
    encoder.eval().requires_grad_(False)
