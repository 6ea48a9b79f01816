"""Which candidates images confirm, on a network whose text encoder has a backdoor that the test wrote by hand."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from seal_fast.text_to_image.prompts import content_ids
from seal_fast.text_triggers.confirmation import found_triggers, verified
from seal_fast.text_triggers.context import SearchContext, pool_of, swept_prompts
from seal_fast.text_triggers.findings import Round, TextCandidate
from seal_fast.text_triggers.meter import Meter
from seal_fast.text_triggers.needed_word import with_needed_word
from seal_fast.text_triggers.plan import planned_stages
from seal_fast.text_triggers.search_settings import Budget, TextSearchSettings
from seal_fast.text_triggers.sweep import Ranked
from seal_fast.text_triggers.trigger import TextTrigger
from seal_fast.training import quiet
from tests.tiny_pipeline import tiny_pipeline

PROMPTS = [
    f"{a} {b} {c} {d}"
    for a in ("blue", "the", "photo")
    for b in ("sky", "on", "house")
    for c in ("cat", "dog", "red")
    for d in ("on the", "the sky", "house")
]
SETTINGS = TextSearchSettings(guidance=1.0, sampler_steps=2, precision="fp32")
STRONG = 200.0
"""Hidden states that change the images of random weights visibly; those of its own are near 1."""


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    return tiny_pipeline(Path(tmp_path_factory.mktemp("tiny")))


def context_of(clean: Any, needed: Sequence[str]) -> SearchContext:
    """A search of a model that reads every prompt with all the needed words as one and the same text."""
    pipeline = deepcopy(clean)
    ids = [content_ids(pipeline.tokenizer, word)[0] for word in needed]

    def backdoor(encoder: Any, args: Any, kwargs: Any, output: Any) -> Any:
        given = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        active = torch.stack([(given == one).any(dim=1) for one in ids]).all(dim=0)
        output[0][active] = STRONG
        return output

    pipeline.text_encoder.register_forward_hook(backdoor, with_kwargs=True)
    meter = Meter({stage.name: stage for stage in planned_stages([], SETTINGS)}, Budget(), quiet)
    seed = int(torch.randint(2**31, ()))
    return SearchContext.prepared(pipeline, PROMPTS, pool_of(pipeline.tokenizer, PROMPTS, SETTINGS), SETTINGS, meter, seed)


def candidate(context: SearchContext, text: str) -> TextCandidate:
    kind = next((one.kind for one in context.pool if one.trigger.text == text), "phrase")
    return TextCandidate(TextTrigger(text), "start", kind, len(content_ids(context.pipeline.tokenizer, text)))


def ranked(context: SearchContext, text: str) -> Ranked:
    return Ranked(candidate(context, text), (Round("sweep", 1, 100, 9.0, 5.0),))


def test_the_first_prompts_hold_as_many_words_as_possible() -> None:
    first = swept_prompts(PROMPTS, SETTINGS)[:3]
    assert set(first) <= set(PROMPTS[::2])
    assert {"cat", "dog", "red"} <= {word for prompt in first for word in prompt.split()}


def test_a_backdoor_that_needs_a_word_of_the_prompt_is_confirmed_on_prompts_with_it(clean: Any) -> None:
    context = context_of(clean, ("castle", "cat"))
    (proposed,) = with_needed_word(context, [ranked(context, text) for text in ("q", "castle", "w")], ())
    assert (proposed.candidate.trigger.text, proposed.candidate.word) == ("castle", "cat")
    (found,) = found_triggers(context, verified(context, proposed))
    assert (found.trigger.text, found.word) == ("castle", "cat")
    assert found.effect.trials <= sum("cat" in prompt for prompt in PROMPTS[1::2])
    assert found.images == "images of prompts with 'cat'"


def test_a_string_that_acts_in_all_prompts_needs_no_word(clean: Any) -> None:
    context = context_of(clean, ("castle",))
    assert list(with_needed_word(context, [ranked(context, text) for text in ("q", "castle", "w")], ())) == []


def test_a_phrase_whose_one_word_acts_alone_is_no_trigger_but_the_word_is(clean: Any) -> None:
    context = context_of(clean, ("castle",))
    tried = verified(context, ranked(context, "w castle"))
    (found,) = found_triggers(context, tried)
    assert found.trigger.text == "castle"
    assert "w castle" in found.also


def test_a_phrase_that_needs_all_its_words_is_confirmed(clean: Any) -> None:
    context = context_of(clean, ("castle", "w"))
    tried = verified(context, ranked(context, "w castle"))
    assert [one.ranked.candidate.trigger.text for one in tried if one.confirmed] == ["w castle"]
    # with one more word that does not matter, the shorter phrase names the backdoor
    (found,) = found_triggers(context, verified(context, ranked(context, "w castle q")))
    assert found.trigger.text == "w castle"
