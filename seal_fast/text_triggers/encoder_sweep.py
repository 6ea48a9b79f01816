"""Sweep the text encoder alone: which strings move its hidden states as no other string of their kind does?

A backdoor in the text encoder shows without any image. A target prompt attack gives different prompts the same hidden states,
so they vary less over the prompts. A target attribute attack, or an embedding that was trained to draw something, moves the
hidden states further than other strings do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seal_fast.text_to_image.precision import Precision, autocast
from seal_fast.text_to_image.prompts import encode
from seal_fast.text_triggers.context import SearchContext
from seal_fast.text_triggers.findings import TextCandidate
from seal_fast.text_triggers.ranking import deviations
from seal_fast.text_triggers.search_settings import TextSearchSettings
from seal_fast.text_triggers.sweep import Change, Ranked, everywhere, fitting, kind_and_place, ranked_by

PROMPTS_PER_PASS = 256
ENCODER = "encoder"
"""Name of this round."""


def encoder_round(context: SearchContext, entries: Sequence[Ranked]) -> list[Ranked]:
    """The entries that move the hidden states most, beyond their kind; the best first."""
    settings = context.settings
    candidates = [entry.candidate for entry in entries]
    scores = encoder_deviations(context.pipeline, candidates, context.probes.model.prompts, everywhere, settings)
    return ranked_by(ENCODER, entries, scores, torch.zeros_like(scores))[: settings.encoder_kept]


def encoder_deviations(
    pipeline: Any,
    candidates: Sequence[TextCandidate],
    prompts: Sequence[str],
    change: Change,
    settings: TextSearchSettings,
) -> Tensor:
    """How many standard deviations each candidate lies above its kind, in shift or in collapse of the hidden states.

    Args:
        pipeline: a diffusers StableDiffusionPipeline.
        candidates: C candidates.
        prompts: clean prompts.
        change: puts a candidate into a prompt.
        settings: settings of the search.

    Returns:
        float32 [C].
    """
    clean = _summaries(pipeline, prompts, "fp32")
    chosen = [fitting(candidate, prompts, settings.encoder_prompts) for candidate in candidates]
    texts = [change(one, prompts[place]) for one, places in zip(candidates, chosen, strict=True) for place in places]
    changed = _summaries(pipeline, texts, settings.precision).unflatten(0, (len(candidates), -1))
    before = clean[torch.tensor(chosen)]
    shift = (changed - before).square().sum(dim=-1).mean(dim=1)
    collapse = _variance(before) / _variance(changed).clamp_min(1e-12)
    kinds = [kind_and_place(candidate) for candidate in candidates]
    return deviations(torch.stack([shift, collapse], dim=1), kinds, range(len(candidates)), settings)


@torch.no_grad()
def _summaries(pipeline: Any, prompts: Sequence[str], precision: Precision) -> Tensor:
    """The mean of each prompt's hidden states and the last of them, float32 [N,2D] on the CPU."""
    found = []
    with autocast(pipeline.device, precision):
        for first in range(0, len(prompts), PROMPTS_PER_PASS):
            states = encode(pipeline, prompts[first : first + PROMPTS_PER_PASS]).float()
            found.append(torch.cat([states.mean(dim=1), states[:, -1]], dim=1).cpu())
    return torch.cat(found)


def _variance(summaries: Tensor) -> Tensor:
    """Variance over prompts, summed over features, of [C,P,2D]; [C]."""
    return summaries.var(dim=1).sum(dim=-1)
