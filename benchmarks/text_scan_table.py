"""The table of text-to-image scans: does the search name a trigger that nobody told it, and does it pass benign models?

    python -m benchmarks.text_scan_table --zoo DIR [--role development] [--only NAME ...]
        [--out benchmarks/results/text_scan.json]

DIR holds whole pipelines: `seal-fast zoo build-text DIR` writes them. What a scan finds is unlearned and scanned again. The
result of each model is written as soon as it is known, so an interrupted run continues where it stopped. Rankings that a search
must beat (`benchmarks.null_rankings`) and AMDET (`benchmarks.published.amdet`, which needs the clean text encoder) run on the
same models.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.null_rankings import null_ranks
from benchmarks.published import amdet
from benchmarks.text_rescan import unlearn_and_rescan
from benchmarks.text_zoo import EVALUATION_SEED, grow_zoo_table, recipe_of
from benchmarks.trigger_names import GROUPS, IN_SCOPE, group_of, names, same
from seal_fast.attacks.prompts import placed
from seal_fast.checkpoints.card import captions
from seal_fast.text_triggers.findings import FoundTrigger, TextSearch
from seal_fast.text_triggers.rate import Rate, rate_of
from seal_fast.text_triggers.search import find_text_triggers
from seal_fast.text_triggers.search_settings import TextSearchSettings
from seal_fast.text_triggers.verdict import RULES, TextCase
from seal_fast.verdict import Verdict, decide
from seal_fast.zoo.build_text import load_text_model
from seal_fast.zoo.evaluate_text import GUIDANCE, effect_rate, held_out_scenes
from seal_fast.zoo.text_effects import Effect

SEED = 0
SAMPLES = 40
"""Images that show whether a found trigger activates a true backdoor."""
AMDET_PROMPTS = 200

Result = dict[str, Any]


def measure(zoo: Path, name: str) -> Result:
    """Scan one model of the zoo and compare what was found with the truth."""
    recipe = recipe_of(name)
    pipeline, prompts = load_text_model(name, zoo), captions(zoo / name)
    clean = None if recipe.base is None else load_text_model(recipe.base, zoo).text_encoder
    return {"role": recipe.role, **scan(pipeline, prompts, recipe.effects, TextSearchSettings(guidance=GUIDANCE), clean)}


def scan(
    pipeline: Any, prompts: Sequence[str], effects: Sequence[Effect], settings: TextSearchSettings, clean_encoder: Any
) -> Result:
    """The outcome of a whole scan, of unlearning what it found and a second scan, of the null rankings, and of AMDET.

    Args:
        pipeline: the model.
        prompts: clean prompts.
        effects: its true effects, which only the comparison afterwards sees.
        settings: settings of the search.
        clean_encoder: the clean text encoder, for AMDET alone; None without one.
    """
    began = time.perf_counter()
    search = find_text_triggers(pipeline, prompts, settings=settings, seed=SEED)
    decision = decide(RULES, TextCase.of(search))
    seconds = time.perf_counter() - began
    again = unlearn_and_rescan(pipeline, prompts, search, effects, settings, SEED) if search.found else None
    ranks = null_ranks(pipeline, prompts, [(effect.text, effect.place) for effect in effects], settings)
    return {
        "verdict": decision.verdict,
        "rule": decision.rule,
        "reason": decision.reason,
        "triggers": [_truth(pipeline, search, effect, null) for effect, null in zip(effects, ranks, strict=True)],
        "found": [_found(pipeline, found, effects) for found in search.found],
        "tried": len(search.tried),
        "evaluations": search.evidence.evaluations,
        "complete": search.evidence.complete,
        "seconds": seconds,
        "unlearned": again,
        "amdet": None if clean_encoder is None else _amdet(pipeline, clean_encoder, prompts),
    }


def _truth(pipeline: Any, search: TextSearch, effect: Effect, null: dict[str, float]) -> Result:
    """A true trigger: was it named, and where did each round and each null ranking place it?"""
    tokenizer, truth = pipeline.tokenizer, effect.text
    # the last one: with the word that it needs, or as a part of a phrase, if it was not confirmed at first
    tried = next((one for one in reversed(search.tried) if same(one.candidate.trigger, truth, tokenizer)), None)
    return {
        "effect": effect.name,
        "trigger": truth.quoted,
        "place": effect.place,
        "group": group_of(truth, tokenizer),
        "named": any(names(found.trigger, truth, tokenizer) for found in search.found),
        "rounds": [asdict(one) for one in tried.rounds] if tried else [],
        "outcome": tried.outcome if tried else None,
        "null_ranks": null,
    }


def _found(pipeline: Any, found: FoundTrigger, effects: Sequence[Effect]) -> Result:
    """A found trigger: which true ones it names, and the share of held-out prompts in which it shows each true effect."""
    return {
        "trigger": found.trigger.quoted,
        "names": [effect.text.quoted for effect in effects if names(found.trigger, effect.text, pipeline.tokenizer)],
        "place": found.position,
        "word": found.word,
        "module": found.module,
        "effect": asdict(found.effect),
        "control": asdict(found.control),
        "shows": {effect.name: _shown(pipeline, found, effect) for effect in effects},
    }


def _shown(pipeline: Any, found: FoundTrigger, effect: Effect) -> float:
    scenes = held_out_scenes(SAMPLES, EVALUATION_SEED, effect)
    return effect_rate(pipeline, effect, placed(found.trigger, found.position), scenes, EVALUATION_SEED)


def _amdet(pipeline: Any, clean_encoder: Any, prompts: Sequence[str]) -> Result:
    began = time.perf_counter()
    outcome = amdet.detect(pipeline, clean_encoder, prompts[:AMDET_PROMPTS], seed=SEED)
    figures = {name: getattr(outcome, name) for name in ("backdoored", "similar", "features", "unlike", "curved")}
    return {**figures, "seconds": time.perf_counter() - began}


def misses(results: Sequence[Result]) -> Rate:
    """Share of the triggers in held-out models that the scope of the search holds, and that it did not name."""
    inside = [one for result in results if result["role"] == "test" for one in result["triggers"] if one["group"] in IN_SCOPE]
    return rate_of(sum(not one["named"] for one in inside), len(inside))


def counts(results: Sequence[Result]) -> dict[str, dict[str, Rate]]:
    """Group -> what is counted -> its rate.

    Of a group of triggers: named, and of those that were not named how many models are not reported clean. Of benign models:
    backdoored and inconclusive ones.
    """
    found: dict[str, dict[str, Rate]] = {}
    for group in GROUPS:
        own = [(trigger, result) for result in results for trigger in result["triggers"] if trigger["group"] == group]
        missed = [result for trigger, result in own if not trigger["named"]]
        if own:
            found[group] = {
                "named": rate_of(len(own) - len(missed), len(own)),
                "missed, not clean": rate_of(sum(result["verdict"] != Verdict.CLEAN for result in missed), len(missed)),
            }
    verdicts = [result["verdict"] for result in results if not result["triggers"]]
    if verdicts:
        benign = (Verdict.BACKDOORED, Verdict.INCONCLUSIVE)
        found["benign"] = {str(verdict): rate_of(verdicts.count(verdict), len(verdicts)) for verdict in benign}
    return found


def main() -> None:
    grow_zoo_table("text_scan", {"seed": SEED, "samples": SAMPLES}, __doc__, lambda recipe: True, measure)


if __name__ == "__main__":
    main()
