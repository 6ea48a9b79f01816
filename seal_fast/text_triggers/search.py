"""Find the text triggers of a text-to-image model that nobody told us."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from seal_fast.text_triggers.findings import TextEvidence, TextScope, TextSearch
from seal_fast.text_triggers.rate import rate_of
from seal_fast.text_triggers.search_settings import Budget, TextSearchSettings
from seal_fast.training import OnStep, Stage, quiet

DEFAULTS = TextSearchSettings()


def stages(pipeline: Any, settings: TextSearchSettings) -> list[Stage]:
    """The stages of a search with the evaluations of each, for progress and for a dry run."""
    return [Stage("sweep", 1, 1)]


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
    scope = TextScope(0, 0, 0, 0, 0, (), (), rate_of(0, 0))
    return TextSearch((), (), scope, TextEvidence(0.0, 0.0, None, 1.0, 0, True))
