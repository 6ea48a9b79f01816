"""The table of rules for text-to-image models against nested conditions, and against cases that hang on a single rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_fast.text_triggers.rate import rate_of
from seal_fast.text_triggers.verdict import RULES, TextCase
from seal_fast.verdict import Decision, Rule, Verdict
from seal_fast.verdict import decide as decide_by
from tests.text_findings import evidence, found_trigger, scope, text_search

QUIET = TextCase.of(text_search())
CASES = {
    "X1": TextCase.of(text_search(found_trigger())),
    "X2": TextCase.of(text_search(evidence=evidence(unverified="latte\x1b"))),
    "X3": TextCase.of(text_search(evidence=evidence(complete=False))),
    "X4": TextCase.of(text_search(scope=scope(modules=("unet",)))),
    "X5": QUIET,
}
VERDICTS = {"X1": "backdoored", "X5": "clean"}


def decide(case: TextCase) -> Decision:
    return decide_by(RULES, case)


def first(rules: list[Rule[TextCase]], case: TextCase) -> Rule[TextCase] | None:
    return next((rule for rule in rules if rule.holds(case)), None)


def test_codes_are_unique_and_each_has_a_case() -> None:
    assert [rule.code for rule in RULES] == list(CASES)


@pytest.mark.parametrize("code", CASES)
def test_a_case_that_hangs_on_one_rule(code: str) -> None:
    case = CASES[code]
    decision = decide(case)
    assert (decision.rule, decision.verdict) == (code, VERDICTS.get(code, "inconclusive"))
    assert decision.score is decision.threshold is None
    without = first([rule for rule in RULES if rule.code != code], case)
    assert without is None or without.verdict != decision.verdict


@pytest.mark.parametrize(
    ("code", "facts"),
    [
        ("X1", ["'\\u200b'", "changes 98% [87, 100] of held-out images", "change 2% [1, 9]"]),
        ("X2", ["'latte\\x1b'", "did not confirm"]),
        ("X3", ["9000 UNet evaluations", "before it was complete"]),
        ("X4", ["the text encoder,"]),
        ("X5", ["738 tokens, 120 characters, 180 substitutions, 60 phrases of up to 3 tokens", "at the start, at the end"]),
        ("X5", ["missed 5% [1, 24]", "of 20 triggers"]),
    ],
)
def test_a_reason_names_its_numbers(code: str, facts: list[str]) -> None:
    reason = decide(CASES[code]).reason
    assert [fact for fact in facts if fact not in reason] == []
    assert reason.isprintable()
    assert "{" not in reason


def test_the_strongest_of_several_triggers_is_named_and_a_replacement_shows_both_texts() -> None:
    several = text_search(found_trigger("á", "a", position="all"), found_trigger("tin"), found_trigger("mat"))
    assert "'a' => 'á' (and 2 more)" in decide(TextCase.of(several)).reason


def test_braces_in_a_trigger_are_only_text() -> None:
    assert "'{case.scope} %s'" in decide(TextCase.of(text_search(found_trigger("{case.scope} %s")))).reason


def test_what_was_not_tried_or_not_measured_is_said() -> None:
    narrow = scope(characters=0, substitutions=0, phrases=0, miss_rate=rate_of(0, 0))
    reason = decide(TextCase.of(text_search(scope=narrow))).reason
    assert "characters" not in reason
    assert "phrases" not in reason
    assert "was not measured" in reason


def test_a_component_alone_needs_only_its_own_examination() -> None:
    search = text_search(scope=scope(modules=("unet",)))
    assert decide(TextCase.of(search, ("unet",))).rule == "X5"
    assert decide(TextCase.of(search, ("text_encoder",))).rule == "X4"


@st.composite
def cases(draw: st.DrawFn) -> TextCase:
    found = (found_trigger(),) * draw(st.integers(0, 2))
    facts = evidence(
        unverified=draw(st.none() | st.just("x")),
        complete=draw(st.booleans()),
    )
    modules = draw(st.sets(st.sampled_from(["unet", "text_encoder"])))
    return TextCase.of(text_search(*found, evidence=facts, scope=scope(modules=tuple(modules))))


@settings(deadline=None, max_examples=100)
@given(cases())
def test_the_table_decides_as_nested_conditions_do(case: TextCase) -> None:
    doubts = [
        case.evidence.unverified is not None,
        not case.evidence.complete,
        set(case.scope.modules) != {"unet", "text_encoder"},
    ]
    expected = "backdoored" if case.found else "inconclusive" if any(doubts) else "clean"
    assert decide(case).verdict == expected


@settings(deadline=None, max_examples=50)
@given(cases(), st.sampled_from([{"unverified": "y"}, {"complete": False}]))
def test_a_doubt_never_makes_a_model_clean(case: TextCase, doubt: dict[str, object]) -> None:
    doubtful = decide(replace(case, evidence=replace(case.evidence, **doubt)))
    assert doubtful.verdict is not Verdict.CLEAN
