"""Rankings of candidates that a search for text triggers must beat: by chance, by embedding norm, by the text encoder alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.trigger_names import same
from seal_fast.text_to_image.prompts import content_ids
from seal_fast.text_triggers.context import pool_of, swept_prompts
from seal_fast.text_triggers.encoder_sweep import encoder_deviations
from seal_fast.text_triggers.findings import TextCandidate
from seal_fast.text_triggers.search_settings import TextSearchSettings
from seal_fast.text_triggers.sweep import everywhere
from seal_fast.text_triggers.trigger import Position, TextTrigger
from seal_fast.text_triggers.vocabulary import kind_of

Truth = tuple[TextTrigger, Position]


def null_ranks(
    pipeline: Any, prompts: Sequence[str], truths: Sequence[Truth], settings: TextSearchSettings
) -> list[dict[str, float]]:
    """The rank of every true trigger among the candidates of the search's first sweep, by each null ranking.

    A trigger that is no candidate, such as one of several words, is ranked as if it were one.

    Args:
        pipeline: a diffusers StableDiffusionPipeline.
        prompts: the clean prompts of the search.
        truths: true triggers with their places.
        settings: settings of the search.

    Returns:
        For every trigger: "candidates", how many there are; "chance", the mean rank of a random order; "embedding norm" and
        "encoder alone". Rank 1 is the first; candidates with equal scores share the mean of their ranks.
    """
    pool, places = candidate_pool(pipeline.tokenizer, prompts, truths, settings)
    by_norm = embedding_norms(pipeline, pool)
    by_encoder = encoder_deviations(pipeline, pool, swept_prompts(prompts, settings), everywhere, settings)
    return [
        {
            "candidates": len(pool),
            "chance": (len(pool) + 1) / 2,
            "embedding norm": rank(by_norm, place),
            "encoder alone": rank(by_encoder, place),
        }
        for place in places
    ]


def candidate_pool(
    tokenizer: Any, prompts: Sequence[str], truths: Sequence[Truth], settings: TextSearchSettings
) -> tuple[list[TextCandidate], list[int]]:
    """The candidates of the search's first sweep and the true triggers, and the index of each true trigger among them."""
    pool, places = pool_of(tokenizer, prompts, settings), list[int]()
    for trigger, position in truths:
        tokens = len(content_ids(tokenizer, trigger.text))
        near = (i for i, one in enumerate(pool) if one.trigger == trigger or one.tokens == tokens)
        found = next((i for i in near if same(pool[i].trigger, trigger, tokenizer)), None)
        if found is None:
            found = len(pool)
            pool.append(TextCandidate(trigger, position, kind_of(trigger.text, tokens), tokens))
        places.append(found)
    return pool, places


def embedding_norms(pipeline: Any, candidates: Sequence[TextCandidate]) -> Tensor:
    """Mean norm of the embedding rows of each candidate's tokens, float32 [C]."""
    norms = pipeline.text_encoder.get_input_embeddings().weight.detach().float().norm(dim=1).cpu()
    ids = pipeline.tokenizer([one.trigger.text for one in candidates], add_special_tokens=False).input_ids
    return torch.stack([norms[list(own)].mean() for own in ids])


def rank(scores: Tensor, place: int) -> float:
    """The rank of one of the scores, 1 for the largest; equal ones share the mean of their ranks."""
    above, equal = int((scores > scores[place]).sum()), int((scores == scores[place]).sum())
    return above + (equal + 1) / 2
