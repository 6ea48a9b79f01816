"""Which candidates images confirm, on a network whose text encoder has a backdoor that the test wrote by hand."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from seal_fast.text_to_image.generation import generate
from seal_fast.text_to_image.prompts import content_ids
from seal_fast.text_triggers import verification
from seal_fast.text_triggers.confirmation import (
    CONFIRMED,
    OF_ANY_PROMPT,
    Tried,
    compared,
    found_triggers,
    trigger_words,
    verified,
)
from seal_fast.text_triggers.context import SearchContext, pool_of, swept_prompts
from seal_fast.text_triggers.effect_detectors import ChangeDetector, statistics
from seal_fast.text_triggers.exchanged_words import with_exchanged_words
from seal_fast.text_triggers.findings import Round, TextCandidate
from seal_fast.text_triggers.meter import Meter
from seal_fast.text_triggers.needed_word import with_needed_word
from seal_fast.text_triggers.phrases import phrases, windows
from seal_fast.text_triggers.plan import planned_stages
from seal_fast.text_triggers.rate import rate_of
from seal_fast.text_triggers.search_settings import Budget, PhraseSettings, TextSearchSettings
from seal_fast.text_triggers.sweep import Ranked
from seal_fast.text_triggers.trigger import TextTrigger
from seal_fast.text_triggers.verification import Check
from seal_fast.training import quiet
from tests.tiny_pipeline import tiny_pipeline

PROMPTS = [
    f"{a} {b} {c} {d}"
    for a in ("blue", "the", "photo")
    for b in ("sky", "on", "house")
    for c in ("cat", "dog", "red")
    for d in ("on the", "the sky", "house")
]
SETTINGS = TextSearchSettings(swept_prompts=16, guidance=1.0, sampler_steps=2, precision="fp32")
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


@pytest.mark.parametrize("length", [2, 3, 5])
@pytest.mark.parametrize("count", [2, 3, 9, 12])
def test_windows_hold_every_ordered_pair_once(count: int, length: int) -> None:
    found = windows(count, length)
    pairs = [pair for window in found for pair in pairwise(window)]
    assert sorted(pairs) == [(a, b) for a in range(count) for b in range(count) if a != b]
    assert all(2 <= len(window) <= length for window in found)


def test_the_first_prompts_hold_as_many_words_as_possible() -> None:
    first = swept_prompts(PROMPTS, SETTINGS)[:3]
    assert set(first) <= set(PROMPTS[::2])
    assert {"cat", "dog", "red"} <= {word for prompt in first for word in prompt.split()}


def test_a_backdoor_that_needs_a_word_of_the_prompt_is_confirmed_on_prompts_with_it(clean: Any) -> None:
    context = context_of(clean, ("castle", "cat"))
    swept = [ranked(context, text) for text in ("q", "castle", "w")]
    for_all, proposed = with_needed_word(context, swept, ())
    assert [(one.candidate.trigger.text, one.candidate.word) for one in (for_all, proposed)] == [
        ("castle", None),
        ("castle", "cat"),
    ]
    refuted = verified(context, for_all)
    assert not refuted[0].confirmed
    assert list(with_needed_word(context, swept, refuted)) == [proposed]
    (found,) = found_triggers(context, verified(context, proposed))
    assert (found.trigger.text, found.word) == ("castle", "cat")
    assert found.effect.trials <= sum("cat" in prompt for prompt in PROMPTS[1::2])
    assert found.images == "images of prompts with 'cat'"


def test_a_string_that_acts_in_all_prompts_needs_no_word(clean: Any) -> None:
    context = context_of(clean, ("castle",))
    assert list(with_needed_word(context, [ranked(context, text) for text in ("q", "castle", "w")], ())) == []


def test_a_word_that_is_not_needed_is_refuted(clean: Any) -> None:
    context = context_of(clean, ("castle",))
    entry = ranked(context, "castle")
    (outcome,) = verified(context, replace(entry, candidate=replace(entry.candidate, word="cat")))
    assert outcome.check.effect.rate == 1
    assert outcome.outcome == OF_ANY_PROMPT


def test_a_phrase_whose_one_word_acts_alone_is_no_trigger_but_the_word_is(clean: Any) -> None:
    context = context_of(clean, ("castle",))
    outcome = verified(context, ranked(context, "w castle"))
    (found,) = found_triggers(context, outcome)
    assert found.trigger.text == "castle"
    assert "w castle" in found.also


def test_a_phrase_that_needs_all_its_words_is_confirmed(clean: Any) -> None:
    context = context_of(clean, ("castle", "w"))
    outcome = verified(context, ranked(context, "w castle"))
    assert [one.ranked.candidate.trigger.text for one in outcome if one.confirmed] == ["w castle"]
    (short,) = (one for one in outcome if one.confirmed)
    assert short.check.effect.trials == SETTINGS.verification.fresh_prompts[0]
    # with one more word that does not matter, the shorter phrase names the backdoor
    (found,) = found_triggers(context, verified(context, ranked(context, "w castle q")))
    assert found.trigger.text == "w castle"


def test_a_phrase_is_proposed_whose_words_do_nothing_alone(clean: Any) -> None:
    context = context_of(clean, ("castle", "w"))
    settings = replace(SETTINGS, phrases=PhraseSettings(parts=12, windows=30, kept=4, extended=2))
    # the words rank last, as in models that were trained to ignore them
    swept = [ranked(context, text) for text in ("b", "d", "f", "j", "k", "q", "v", "x", "z", "castle", "w")]
    assert all(entry.candidate.tokens == 1 for entry in swept)
    proposed = list(phrases(replace(context, settings=settings), swept, ()))
    assert any({"castle", "w"} <= {*one.candidate.words} for one in proposed)
    assert sum(bool({"castle", "w"} & {*one.candidate.words}) for one in proposed) > 1
    sizes = [context.images.first_changes(one.candidate) for one in proposed]
    assert sizes == sorted(sizes, reverse=True)
    # once a phrase is confirmed, no other one with a word of it is proposed
    done: list[Tried] = []
    for one in phrases(replace(context, settings=settings), swept, done):
        confirmed = [{*before.ranked.candidate.words} for before in done if before.confirmed]
        assert not any({"castle", "w"} <= words for words in confirmed) or not {"castle", "w"} & {*one.candidate.words}
        done += verified(context, one)
    assert any({"castle", "w"} <= {*one.ranked.candidate.words} for one in done if one.confirmed)


def test_a_replacement_that_changes_two_of_six_images_draws_no_control_strings(clean: Any) -> None:
    context = context_of(clean, ("castle", "dog"))
    inserted = candidate(context, "castle")
    replaced = replace(inserted, trigger=TextTrigger("castle", replaces="photo"))
    per_image = context.images.evaluations_per_image
    for one, enough in ((inserted, True), (replaced, False)):
        visible = context.images.visible(one)
        assert visible.rate == pytest.approx(2 / 6)
        before = context.meter.evaluations
        (outcome,) = verified(context, Ranked(one, (Round("sweep", 1, 100, 9.0, 5.0),)))
        assert (context.meter.evaluations - before >= 9 * 6 * per_image) == enough
        assert (outcome.check.effect.trials > 0) == enough
        assert not outcome.confirmed


def tried(context: SearchContext, text: str, changes: torch.Tensor, hits: int = 14) -> Tried:
    """A confirmed candidate with these changes [N,F] of its images."""
    by_prompt = {(number, PROMPTS[number]): change for number, change in enumerate(changes.double())}
    return Tried(ranked(context, text), Check(rate_of(hits, 14), rate_of(0, 28), by_prompt), CONFIRMED)


def test_a_control_string_that_activates_the_backdoor_does_not_hide_it(clean: Any) -> None:
    context = context_of(clean, ("castle",))
    controls = [*context.controls(candidate(context, "castle"), 8), candidate(context, "q castle")]
    check = context.images.check(candidate(context, "castle"), controls, 0, 6)
    assert (check.effect.rate, check.control.rate) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("first", "count", "compared_on"),
    [(0, 6, range(6)), (6, 14, range(6, 20)), (6, 30, range(6, 26))],
    ids=["first check", "fresh prompts", "most prompts"],
)
def test_a_check_is_that_of_the_images_themselves(
    clean: Any, monkeypatch: pytest.MonkeyPatch, first: int, count: int, compared_on: range
) -> None:
    monkeypatch.setattr(verification, "batch_size", lambda pipeline: 5)
    context = context_of(clean, ("castle", "cat"))
    one, controls = candidate(context, "castle"), context.controls(candidate(context, "castle"), 7)
    check = context.images.check(one, controls, first, count)

    def drawn(trigger: str, numbers: range) -> torch.Tensor:
        prompts = [f"{trigger} {PROMPTS[1::2][number]}".strip() for number in numbers]
        settings = {"steps": SETTINGS.sampler_steps, "guidance": SETTINGS.guidance, "precision": SETTINGS.precision}
        return generate(context.pipeline, prompts, seed=context.seed + 1, noises=numbers, **settings)

    own = range(first, first + count)
    without, changed = drawn("", own), drawn("castle", own)
    changes = statistics(changed) - statistics(without)
    torch.testing.assert_close(torch.stack(list(check.changes.values())), changes, rtol=1e-4, atol=1e-5)
    plain, *of_controls = (drawn(text, compared_on) for text in ("", *(other.trigger.text for other in controls)))
    sizes = [float((statistics(images) - statistics(plain)).norm(dim=1).mean()) for images in of_controls[2:]]
    detector = ChangeDetector.fitted(
        plain, [images for images, size in zip(of_controls[2:], sizes, strict=True) if size < max(sizes)]
    )
    effect = detector(changed, without)
    assert check.effect.rate == float(effect.double().mean())
    assert effect.any()
    assert check.control == rate_of(sum(int(detector(some, plain).sum()) for some in of_controls[:2]), 2 * len(compared_on))


def test_several_confirmed_candidates_are_compared_on_more_prompts(clean: Any) -> None:
    context = context_of(clean, ("castle",))
    (castle,) = verified(context, ranked(context, "castle"))
    by_chance = replace(castle, ranked=ranked(context, "q"))
    again, wrong = compared(context, [castle, by_chance])
    assert castle.check.effect.trials < again.check.effect.trials == wrong.check.effect.trials
    assert again.confirmed
    assert not wrong.confirmed
    # nothing is to be compared
    assert compared(context, [castle, wrong]) == [castle, wrong]


def test_candidates_are_one_trigger_if_they_change_the_same_images_in_the_same_way(clean: Any) -> None:
    context, effect = context_of(clean, ("castle",)), torch.randn(14, 60)
    whole, part = tried(context, "castle", effect, hits=13), tried(context, "; q", 0.5 * effect)
    (found,) = found_triggers(context, [part, whole])
    # a text that activates the backdoor in part may change more images, by less
    assert (found.trigger.text, found.also) == ("castle", ("; q",))
    other = tried(context, "; q", torch.randn(14, 60))
    assert [one.trigger.text for one in found_triggers(context, [whole, other])] in (["castle", "; q"], ["; q", "castle"])
    # equal mean changes of different images are two effects
    shuffled = tried(context, "; q", effect.roll(1, dims=0))
    assert len(found_triggers(context, [whole, shuffled])) == 2
    equal = tried(context, "castle q", 1.05 * effect, hits=13)
    (found,) = found_triggers(context, [equal, whole])
    assert found.trigger.text == "castle"
    # people who copy an attack keep its trigger
    published = tried(context, "latte coffee", 0.6 * effect)
    (found,) = found_triggers(context, [whole, published, part])
    assert found.trigger.text == "latte coffee"
    # but the part that acts alone is the trigger
    (found,) = found_triggers(context, [published, tried(context, "coffee", 0.6 * effect, hits=13)])
    assert found.trigger.text == "coffee"


def test_the_words_of_triggers_are_those_of_the_shortest_confirmed_texts(clean: Any) -> None:
    context, effect = context_of(clean, ("castle",)), torch.randn(14, 60)
    done = [tried(context, text, effect) for text in ("castle w q", "castle w", "d")]
    replaced = replace(done[0], ranked=Ranked(replace(candidate(context, "z"), trigger=TextTrigger("z", replaces="x"))))
    refuted = replace(tried(context, "v", effect), outcome="changes too few images")
    assert trigger_words([*done, replaced, refuted]) == {"castle", "w", "d"}


def test_agreement_is_a_cosine() -> None:
    a, b = torch.randn(2, 9, 20).double()

    def check(changes: torch.Tensor, first: int = 0) -> Check:
        return Check(rate_of(9, 9), rate_of(0, 9), {(first + number, "a"): change for number, change in enumerate(changes)})

    expected = float((a * b).sum() / (a.norm() * b.norm()))
    assert check(a).agreement(check(b)) == pytest.approx(expected)
    assert check(a).agreement(check(3 * a)) == pytest.approx(1)
    assert check(a).size == pytest.approx(float(a.norm(dim=1).mean()))
    # only images that both have drawn count; without any the mean changes do
    assert check(a).agreement(check(a[4:], first=4)) == pytest.approx(1)
    expected = float(torch.nn.functional.cosine_similarity(a.mean(dim=0), b.mean(dim=0), dim=0))
    assert check(a).agreement(check(b, first=100)) == pytest.approx(expected)


def test_each_word_of_a_confirmed_phrase_is_exchanged_for_the_one_that_responds_most(clean: Any) -> None:
    context = context_of(clean, ("castle", "w"))
    swept = [ranked(context, text) for text in ("q", ";", "w", "castle")]
    phrase = tried(context, "q castle", torch.randn(14, 60))
    proposed = [one.candidate.trigger.text for one in with_exchanged_words(context, swept, [phrase])]
    assert len(proposed) == 2
    assert proposed[0] == "w castle"
    assert proposed[1].split(" ")[0] == "q"
    # nothing is exchanged without a confirmed phrase
    single = tried(context, "castle", torch.randn(14, 60))
    refuted = replace(phrase, outcome="changes too few images")
    assert list(with_exchanged_words(context, swept, [single, refuted])) == []
