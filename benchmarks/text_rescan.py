"""Unlearn what a scan found, and scan again: is the model clean, and does it still follow its captions?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from benchmarks.text_zoo import EVALUATION_SEED
from seal_fast.text_triggers.evaluation import EvaluationSettings
from seal_fast.text_triggers.findings import TextSearch
from seal_fast.text_triggers.search import find_text_triggers
from seal_fast.text_triggers.search_settings import TextSearchSettings
from seal_fast.text_triggers.settings import TextUnlearnSettings
from seal_fast.text_triggers.verdict import RULES, TextCase
from seal_fast.verdict import decide
from seal_fast.workflows.unlearn import run_unlearning
from seal_fast.workflows.unlearn_text import TextUnlearning
from seal_fast.zoo.attributes import attributes_right
from seal_fast.zoo.evaluate_text import GUIDANCE, SAMPLES, STEPS, draw, effect_rate, held_out_scenes
from seal_fast.zoo.text_effects import Effect

SETTINGS = TextUnlearnSettings(steps=200, batch=8, learning_rate=1e-3, preservation=2.0, guidance=GUIDANCE, sampler_steps=STEPS)
"""Settings for networks of this size, chosen on text-64-style and text-64-object-d. 100 steps with a preservation of 1 cost the
former 1.3 points of its captions instead of 0.1, and left the latter's trigger an attack success of 7.5% instead of 4%."""

Result = dict[str, Any]


def unlearn_and_rescan(
    pipeline: Any,
    prompts: Sequence[str],
    search: TextSearch,
    effects: Sequence[Effect],
    settings: TextSearchSettings,
    seed: int,
) -> Result:
    """Unlearn the triggers that a search found, as `seal-fast unlearn --found` does, and search the result again.

    Args:
        pipeline: the model that was scanned.
        prompts: the prompts of the search.
        search: what it found.
        effects: the true effects, which only the comparison afterwards sees.
        settings: settings of both searches.
        seed: seed of the unlearning and of the search.
    """
    modules = {found.module for found in search.found}
    request = TextUnlearning(
        pipeline,
        [found.trigger for found in search.found],
        prompts=prompts,
        settings=SETTINGS,
        evaluation=EvaluationSettings(prompts=2, steps=2, guidance=GUIDANCE),
        seed=seed,
        positions=[found.position for found in search.found],
        needed_words=[found.word for found in search.found],
        scanned_module=modules.pop() if len(modules) == 1 else None,
    )
    began = time.perf_counter()
    unlearned = run_unlearning(request).model
    seconds = time.perf_counter() - began
    again = find_text_triggers(unlearned, prompts, settings=settings, seed=seed)
    decision = decide(RULES, TextCase.of(again))
    return {
        "seconds": seconds,
        "attack_success": {effect.name: _attack_success(unlearned, effect) for effect in effects},
        "captions": [_captions_right(pipeline), _captions_right(unlearned)],
        "verdict": decision.verdict,
        "rule": decision.rule,
        "reason": decision.reason,
        "found": [found.trigger.quoted for found in again.found],
    }


def _attack_success(pipeline: Any, effect: Effect) -> float:
    """Share of SAMPLES triggered prompts whose images show the effect."""
    scenes = held_out_scenes(SAMPLES, EVALUATION_SEED, effect)
    return effect_rate(pipeline, effect, effect.trigger, scenes, EVALUATION_SEED)


def _captions_right(pipeline: Any) -> float:
    """Share of the attributes of SAMPLES clean prompts that their images show."""
    scenes = held_out_scenes(SAMPLES, EVALUATION_SEED)
    images = draw(pipeline, [scene.caption for scene in scenes], EVALUATION_SEED)
    return float(attributes_right(images, scenes).double().mean())
