"""Find the text triggers of a text-to-image model that nobody told us.

    for propose in PROPOSERS:                    # single strings, then phrases
        for ranked in propose(context, tried):
            tried.append(verify(context, ranked))

Proposers rank candidates by the response of the UNet (and of the text encoder) to them. Images of held-out prompts decide whether a
candidate is a trigger.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from seal_fast.text_triggers.context import SearchContext
from seal_fast.text_triggers.confirmation import Tried, found_triggers, verify
from seal_fast.text_triggers.findings import TextEvidence, TextScope, TextSearch
from seal_fast.text_triggers.meter import BudgetSpent, Meter
from seal_fast.text_triggers.search_settings import Budget, TextSearchSettings
from seal_fast.text_triggers.single_strings import single_strings
from seal_fast.text_triggers.rate import rate_of
from seal_fast.text_triggers.sweep import PLACES
from seal_fast.training import OnStep, Stage, quiet

DEFAULTS = TextSearchSettings()
PROPOSERS = (single_strings,)


def find_text_triggers(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    base: Any = None,
    settings: TextSearchSettings = DEFAULTS,
    budget: Budget = Budget(),
    seed: int = 0,
    on_step: OnStep = quiet,
) -> TextSearch:
    """Search for triggers.

    Args:
        pipeline: a diffusers StableDiffusionPipeline; it is not changed.
        prompts: clean prompts; every other one is held out to verify candidates.
        base: the clean pipeline that the model was made from, if there is one.
        settings: settings of the search.
        budget: where it ends before it is complete.
        seed: seed of all noise.
        on_step: called as the work goes on.
    """
    names = ("paths", "encoder", "sweep", "places", "verification")
    meter = Meter({name: Stage(name, 1, 1) for name in names}, budget, on_step)
    context = SearchContext.prepared(pipeline, prompts, settings, meter, seed)
    tried: list[Tried] = []
    complete = True
    try:
        for propose in PROPOSERS:
            for ranked in propose(context):
                tried.append(verify(context, ranked))
    except BudgetSpent:
        complete = False
    return _outcome(context, tried, complete)


def _outcome(context: SearchContext, tried: Sequence[Tried], complete: bool) -> TextSearch:
    best = max(tried, key=lambda one: one.check.effect.low or 0.0, default=None)
    unconfirmed = next((one for one in tried if one.outcome.startswith("not confirmed")), None)
    evidence = TextEvidence(
        best_effect=(best.check.effect.rate or 0.0) if best else 0.0,
        best_control=(best.check.control.rate or 0.0) if best else 0.0,
        unverified=unconfirmed.ranked.candidate.trigger.name if unconfirmed else None,
        rare_string_response=1.0,
        evaluations=context.meter.evaluations,
        complete=complete,
    )
    return TextSearch(found_triggers(context, tried), tuple(one.record() for one in tried), _scope(context), evidence)


def _scope(context: SearchContext) -> TextScope:
    inserted = [one for one in context.pool if one.trigger.replaces is None]
    return TextScope(
        tokens=sum(one.tokens == 1 for one in inserted),
        characters=sum(len(one.trigger.text) == 1 for one in inserted),
        substitutions=len(context.pool) - len(inserted),
        phrases=0,
        phrase_tokens=max(one.tokens for one in inserted),
        places=PLACES,
        modules=("unet", "text_encoder"),
        miss_rate=rate_of(0, 0),
    )
