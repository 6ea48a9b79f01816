"""The search for text triggers: vocabulary, ranking, responses, and a whole search."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from seal_fast.acceleration.graph_cache import GraphCache
from seal_fast.text_to_image.latents import noise_schedule, predict
from seal_fast.text_to_image.prompts import content_ids, encode
from seal_fast.text_triggers.candidates import inserted, joined, published, replaced_letters
from seal_fast.text_triggers.confirmation import verify
from seal_fast.text_triggers.context import SearchContext, pool_of
from seal_fast.text_triggers.findings import TextCandidate
from seal_fast.text_triggers.meter import Meter
from seal_fast.text_triggers.ranking import best, deviations
from seal_fast.text_triggers.rate import rate_of
from seal_fast.text_triggers.responses import ResponseProbe
from seal_fast.text_triggers.search import LEAST_PROMPTS, find_text_triggers, stages
from seal_fast.text_triggers.search_settings import (
    Budget,
    NeededWordSettings,
    PhraseSettings,
    RoundSettings,
    TextSearchSettings,
    VerificationSettings,
)
from seal_fast.text_triggers.sweep import Ranked
from seal_fast.text_triggers.trigger import TextTrigger
from seal_fast.text_triggers.verification import Check
from seal_fast.text_triggers.vocabulary import distinct, holds, look_alikes, single_tokens, with_more_holding, words_of
from seal_fast.training import Stage, quiet
from tests.acceleration.recording import OnTheHost
from tests.tiny_pipeline import tiny_pipeline

PROMPTS = [
    f"{one} {two} {three}" for one in ("a", "two", "red") for two in ("red", "old", "big") for three in ("cat", "mat", "tin")
]
SMALL = TextSearchSettings(
    swept_prompts=4,
    places=RoundSettings(2, (0.45,)),
    needed_word=NeededWordSettings(strings=1, per_kind=1),
    phrases=PhraseSettings(parts=6, kept=2, exchanged=6),
    harmless=3,
    kept=4,
    kept_per_kind=1,
    verification=VerificationSettings(candidates=2, controls=5, least_response=0.0, least_deviation=0.0),
    guidance=1.0,
    sampler_steps=2,
    precision="fp32",
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    return tiny_pipeline(Path(tmp_path_factory.mktemp("tiny")))


def test_single_tokens_are_all_strings_of_one_token(pipeline: Any) -> None:
    found = single_tokens(pipeline.tokenizer)
    assert len(found) == len(set(found))
    ids = {content_ids(pipeline.tokenizer, text)[0] for text in found}
    assert all(len(content_ids(pipeline.tokenizer, text)) == 1 for text in found)
    others = set(range(len(pipeline.tokenizer))) - ids - set(pipeline.tokenizer.all_special_ids)
    for number in others:
        assert content_ids(pipeline.tokenizer, pipeline.tokenizer.decode([number]).strip()) != [number]


def test_look_alikes_are_single_characters_that_are_not_the_letter() -> None:
    table = look_alikes()
    assert {"\u0430", "\u00e5"} <= set(table["a"])
    assert {"\u043e", "\u0b66", "\u020f"} <= set(table["o"])
    assert "\u04cf" in table["l"], "a reader takes the Cyrillic palochka for either letter"
    for letter, others in table.items():
        assert letter not in others
        assert len(set(others)) == len(others)
        assert all(unicodedata.category(one)[0] in "LN" for one in others)


def test_candidates_differ_in_their_tokens_and_leave_words_of_the_prompts_out(pipeline: Any) -> None:
    pool = inserted(pipeline.tokenizer, PROMPTS)
    ids = [tuple(content_ids(pipeline.tokenizer, one.trigger.text)) for one in pool]
    assert len(set(ids)) == len(ids)
    assert [len(one) for one in ids] == [one.tokens for one in pool]
    words = {word for prompt in PROMPTS for word in prompt.split()}
    assert not words & {one.trigger.text for one in pool}
    assert all(one.trigger.replaces in "".join(PROMPTS) for one in replaced_letters(pipeline.tokenizer, PROMPTS))


def test_equal_token_ids_are_one_text_in_lower_case(pipeline: Any) -> None:
    assert distinct(pipeline.tokenizer, ["\u039b", "\u03bb", "cat", ""]) == {
        tuple(content_ids(pipeline.tokenizer, text)): text for text in ("\u03bb", "cat")
    }


def test_words_are_read_in_lower_case_and_repeated_until_half_of_the_prompts_hold_them() -> None:
    assert words_of(["A Cat, a 4k CAT"]) == ["a", "cat", "4k"]
    assert holds("A Cat!", "cat")
    assert not holds("category", "cat")
    assert holds("", None)
    others = [f"dog {number}" for number in range(9)]
    for count in (1, 2, 4):
        cats = [f"cat {number}" for number in range(count)]
        found = with_more_holding([*others, *cats], ["cat", None, "zebra"])
        assert set(found) == {*others, *cats}
        share = sum(holds(prompt, "cat") for prompt in found) / len(found)
        assert 1 / 3 < share <= 1 / 2
    assert with_more_holding(["cat", "cat", "dog"], ["cat"]) == ["cat", "cat", "dog"]


def test_a_token_that_the_owner_added_is_no_candidate(pipeline: Any) -> None:
    tokenizer = deepcopy(pipeline.tokenizer)
    assert "<ringed>" not in {one.trigger.text for one in inserted(tokenizer, PROMPTS)}
    tokenizer.add_tokens(["<ringed>"])
    assert len(content_ids(tokenizer, "<ringed>")) == 1
    assert "<ringed>" not in {one.trigger.text for one in inserted(tokenizer, PROMPTS)}


def test_the_outcome_of_a_check_grows_with_the_effect() -> None:
    nothing: dict[tuple[int, str], torch.Tensor] = {}
    for least in (0.0, 0.5, 0.75):
        for controls in (0, 2, 9):
            checks = [Check(rate_of(hits, 14), rate_of(controls, 28), nothing) for hits in range(15)]
            grades = [2 * one.confirmed(least) + one.promising(least) - one.refuted(least) for one in checks]
            assert grades == sorted(grades)
            assert grades[0] == -1
            assert checks[14].confirmed(least)
            for one in checks:
                assert not (one.confirmed(least) and one.refuted(least))
                assert one.promising(least) or not one.confirmed(least)


def test_a_deviation_is_measured_within_the_kind() -> None:
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    logs = torch.randn(60, 2, generator=generator).clamp(-2.5, 2.5)
    logs[30:] += 8
    logs[7] += 12
    kinds = ["weak"] * 30 + ["strong"] * 30
    scores = deviations(logs.exp(), kinds, range(60), TextSearchSettings())
    assert int(scores.argmax()) == 7
    # a factor on all responses of one kind changes nothing
    scaled = logs.exp()
    scaled[30:] *= 100
    torch.testing.assert_close(deviations(scaled, kinds, range(60), TextSearchSettings()), scores, rtol=1e-3, atol=1e-3)


def test_the_best_of_every_kind_go_on() -> None:
    kinds = ["a", "a", "a", "b", "c", "c"]
    assert best([9.0, 8.0, 7.0, 1.0, 0.5, 0.6], kinds, 2, 1) == [0, 1, 3, 5]


def test_a_response_is_the_change_of_the_predicted_noise_relative_to_that_of_the_prompt(pipeline: Any) -> None:
    probe = ResponseProbe.drawn(pipeline, PROMPTS[:3], (0.9, 0.4), steps=4, guidance=2.0, precision="fp32", seed=1)
    texts = [["red big mat", "old cat"], ["tin", "two red"]]
    prompts = [[2, 0], [1, 1]]
    got = probe.respond(texts, prompts, [0, 1])
    assert noise_schedule(pipeline).num_timesteps > probe.timesteps[0] > probe.timesteps[1]
    with torch.no_grad():
        for candidate in range(2):
            for place in range(2):
                for time, t in enumerate(probe.timesteps):
                    x = probe.states[time, prompts[candidate][place]][None]
                    outs = [
                        predict(pipeline.unet, x, torch.tensor([t]), encode(pipeline, [text]))
                        for text in (texts[candidate][place], PROMPTS[prompts[candidate][place]], "")
                    ]
                    expected = (outs[0] - outs[1]).square().sum() / (outs[1] - outs[2]).square().sum()
                    torch.testing.assert_close(got[candidate, place, time], expected, rtol=1e-3, atol=1e-5)


def test_recorded_passes_of_a_sweep_give_the_same_responses(pipeline: Any) -> None:
    probe = ResponseProbe.drawn(pipeline, PROMPTS[:3], (0.9, 0.4), steps=4, guidance=2.0, precision="fp32", seed=1)
    recorder = OnTheHost()
    recording = replace(probe, graphs=GraphCache(recorder))
    for first in range(5):
        texts, places = [[f"{word} cat"] for word in PROMPTS[first : first + 2]], [[first % 3], [2]]
        torch.testing.assert_close(recording.respond(texts, places, [0, 1]), probe.respond(texts, places, [0, 1]))
    assert recorder.count == 1


@pytest.mark.usefixtures("gpu")
def test_recorded_passes_of_a_sweep_give_the_same_responses_on_a_gpu(pipeline: Any) -> None:
    on_device = deepcopy(pipeline).to("cuda")
    probe = ResponseProbe.drawn(on_device, PROMPTS[:3], (0.9, 0.4), steps=4, guidance=2.0, precision="bf16", seed=1)
    assert probe.graphs is not None
    plain = replace(probe, graphs=None)
    for first in range(5):
        texts, places = [[f"{word} cat"] for word in PROMPTS[first : first + 2]], [[first % 3], [2]]
        got, want = (one.respond(texts, places, [0, 1]) for one in (probe, plain))
        torch.testing.assert_close(got, want, rtol=0.05, atol=1e-3)
    assert probe.graphs.recordings


def test_a_search_is_complete_repeats_and_reports_planned_stages(pipeline: Any) -> None:
    seen: set[str] = set()
    found = find_text_triggers(pipeline, PROMPTS, settings=SMALL, seed=3, on_step=lambda stage, *rest: seen.add(stage))
    planned = {stage.name: stage.images for stage in stages(pipeline, PROMPTS, SMALL)}
    assert seen <= planned.keys()
    assert found.evidence.complete
    assert found.tried
    assert found.scope.tokens == sum(one.tokens == 1 for one in inserted(pipeline.tokenizer, PROMPTS))
    assert find_text_triggers(pipeline, PROMPTS, settings=SMALL, seed=3) == found


def test_nothing_responds_beyond_a_base_that_is_the_model_itself(pipeline: Any) -> None:
    settings = replace(SMALL, encoder_limit=math.inf, verification=replace(SMALL.verification, least_deviation=0.01))
    assert find_text_triggers(pipeline, PROMPTS, base=pipeline, settings=settings).tried == ()


def test_a_budget_ends_a_search(pipeline: Any) -> None:
    found = find_text_triggers(pipeline, PROMPTS, settings=SMALL, budget=Budget(evaluations=1))
    assert not found.evidence.complete
    assert found.tried == found.found == ()


def test_too_few_prompts_are_refused(pipeline: Any) -> None:
    with pytest.raises(ValueError, match=f"at least {LEAST_PROMPTS}"):
        find_text_triggers(pipeline, PROMPTS[: LEAST_PROMPTS - 1], settings=SMALL)


def test_a_letter_that_few_prompts_hold_stays_undecided(pipeline: Any) -> None:
    held_out = [prompt.replace("cat", "zip") if place in (1, 3) else prompt for place, prompt in enumerate(PROMPTS)]
    meter = Meter({"paths": Stage("paths", 1, 1)}, Budget(), quiet)
    for prompts in (PROMPTS, held_out):
        context = SearchContext.prepared(pipeline, prompts, pool_of(pipeline.tokenizer, prompts, SMALL), SMALL, meter, seed=0)
        candidate = TextCandidate(TextTrigger("\u017e", replaces="z"), "all", "lookalike of z", 1)
        assert verify(context, Ranked(candidate)).undecided


def test_a_phrase_is_compared_with_phrases_and_a_string_with_strings_of_its_kind(pipeline: Any) -> None:
    meter = Meter({"paths": Stage("paths", 1, 1)}, Budget(), quiet)
    pool = pool_of(pipeline.tokenizer, PROMPTS, SMALL)
    context = SearchContext.prepared(pipeline, PROMPTS, pool, SMALL, meter, seed=0)
    kinds = Counter(one.kind for one in pool)
    single = next(one for one in pool if kinds[one.kind] > 4)
    assert {one.kind for one in context.controls(single, 4)} == {single.kind}
    assert single.trigger not in {one.trigger for one in context.controls(single, 4)}
    phrase = replace(joined(joined(pool[0], pool[1]), pool[2]), position="end")
    controls = context.controls(phrase, 4)
    assert len(controls) == 4
    assert all(len(one.trigger.text.split(" ")) == 3 and one.position == "end" for one in controls)
    for place in range(3):
        for near in context.exchanged(phrase, place, 2):
            same = [a == b for a, b in zip(near.trigger.text.split(" "), phrase.trigger.text.split(" "), strict=True)]
            assert same[:place] + same[place + 1 :] == [True, True]
            assert near.position == "end"


def test_a_letter_takes_other_characters_where_it_has_few_lookalikes(pipeline: Any) -> None:
    meter = Meter({"paths": Stage("paths", 1, 1)}, Budget(), quiet)
    pool = pool_of(pipeline.tokenizer, PROMPTS, SMALL)
    context = SearchContext.prepared(pipeline, PROMPTS, pool, SMALL, meter, seed=0)
    for letter in {one.trigger.replaces for one in pool if one.trigger.replaces}:
        candidate = next(one for one in pool if one.trigger.replaces == letter)
        controls = context.controls(candidate, 200)
        assert len({one.trigger for one in controls}) == 200
        assert all(one.trigger.replaces == letter != one.trigger.text for one in controls)
        assert candidate.trigger not in {one.trigger for one in controls}


def test_published_triggers_are_tried_as_one_text(pipeline: Any) -> None:
    pool = pool_of(pipeline.tokenizer, PROMPTS, SMALL)
    assert {"latte coffee", "mignneko"} <= {one.trigger.text for one in pool}
    assert all(one.tokens > 1 for one in published(pipeline.tokenizer))
