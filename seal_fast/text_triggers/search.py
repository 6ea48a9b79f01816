"""Find the text triggers of a text-to-image model that nobody told us.

    swept = sweep of all single strings
    for propose in PROPOSERS:                            # single strings, then those that need a word, then phrases
        for ranked in propose(context, swept, tried):
            tried += verified(context, ranked)
    tried = compared(context, tried)                     # several confirmed ones on more prompts

Proposers rank candidates by the response of the UNet, and of the text encoder, to them. Images of held-out prompts decide
whether a candidate is a trigger.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from seal_fast.text_triggers.confirmation import Tried, compared, explained, found_triggers, verified
from seal_fast.text_triggers.context import SearchContext, pool_of
from seal_fast.text_triggers.exchanged_words import with_exchanged_words
from seal_fast.text_triggers.findings import TextEvidence, TextScope, TextSearch
from seal_fast.text_triggers.meter import BudgetSpent, Meter
from seal_fast.text_triggers.needed_word import with_needed_word
from seal_fast.text_triggers.phrases import phrases
from seal_fast.text_triggers.plan import phrase_count, planned_stages
from seal_fast.text_triggers.rate import rate_of
from seal_fast.text_triggers.search_settings import Budget, TextSearchSettings
from seal_fast.text_triggers.single_strings import single_strings, sweep_pool
from seal_fast.text_triggers.trigger import POSITIONS
from seal_fast.training import OnStep, Stage, quiet

DEFAULTS = TextSearchSettings()
NO_LIMIT = Budget()
LEAST_PROMPTS = 24
"""Half of the prompts are held out. A candidate is checked on six of them, and again on the others. Six others can confirm an
inserted text that changes all images: for six of six the 95% interval begins at 0.61, above `least_effect`. A replacement needs
twelve, and stays suspicious with fewer."""
MISSES = rate_of(1, 9)
"""Share of the triggers within the scope that were not named in models held out of the development, from
benchmarks/results/text_scan.json."""
PROPOSERS = (single_strings, with_needed_word, phrases, with_exchanged_words)


def stages(
    pipeline: Any, prompts: Sequence[str], settings: TextSearchSettings = DEFAULTS, with_base: bool = False
) -> list[Stage]:
    """The stages of a search with the evaluations that each is expected to take, for progress and for a dry run."""
    return planned_stages(pool_of(pipeline.tokenizer, prompts, settings), settings, with_base)


def find_text_triggers(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    base: Any = None,
    settings: TextSearchSettings = DEFAULTS,
    budget: Budget = NO_LIMIT,
    seed: int = 0,
    on_step: OnStep = quiet,
) -> TextSearch:
    """Search for triggers.

    Args:
        pipeline: a diffusers StableDiffusionPipeline; it is not changed.
        prompts: clean prompts; every other one is held out to verify candidates. Their words have a meaning, so they are no
            candidates by themselves.
        base: the clean pipeline that this one was made from, if there is one. What a text does there is no backdoor.
        settings: settings of the search.
        budget: where it ends before it is complete.
        seed: seed of all noise.
        on_step: called as the work goes on.

    Raises:
        ValueError: fewer than LEAST_PROMPTS prompts.
    """
    if len(prompts) < LEAST_PROMPTS:
        raise ValueError(
            f"a search needs at least {LEAST_PROMPTS} clean prompts, half of which are held out; there are {len(prompts)}"
        )
    pool = pool_of(pipeline.tokenizer, prompts, settings)
    meter = Meter({stage.name: stage for stage in planned_stages(pool, settings, base is not None)}, budget, on_step)
    tried: list[Tried] = []
    complete = True
    context = SearchContext.prepared(pipeline, prompts, pool, settings, meter, seed, base)
    try:
        swept = sweep_pool(context)
        for propose in PROPOSERS:
            for ranked in propose(context, swept, tried):
                if not explained(ranked.candidate, tried):
                    tried += verified(context, ranked)
        tried = compared(context, tried)
    except BudgetSpent:
        complete = False
    return _outcome(context, tried, complete)


def _outcome(context: SearchContext, tried: Sequence[Tried], complete: bool) -> TextSearch:
    best = max(tried, key=lambda one: one.check.effect.low or 0.0, default=None)
    undecided = [one for one in tried if one.undecided and not explained(one.ranked.candidate, tried)]
    unconfirmed = max(undecided, key=lambda one: one.check.effect.rate or 0.0, default=None)
    evidence = TextEvidence(
        best_effect=(best.check.effect.rate or 0.0) if best else 0.0,
        best_control=(best.check.control.rate or 0.0) if best else 0.0,
        unverified=unconfirmed.ranked.candidate.trigger.name if unconfirmed else None,
        evaluations=context.meter.evaluations,
        complete=complete,
    )
    return TextSearch(found_triggers(context, tried), tuple(one.record() for one in tried), _scope(context), evidence)


def _scope(context: SearchContext) -> TextScope:
    inserted = [one for one in context.pool if one.trigger.replaces is None]
    return TextScope(
        tokens=sum(one.tokens == 1 for one in inserted),
        characters=sum(one.tokens > 1 and len(one.trigger.text) == 1 for one in inserted),
        substitutions=len(context.pool) - len(inserted),
        phrases=phrase_count(context.pool, context.settings),
        phrase_tokens=context.settings.phrases.longest,
        places=POSITIONS,
        modules=("unet", "text_encoder"),
        miss_rate=MISSES,
    )
