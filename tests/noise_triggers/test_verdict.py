"""The table of rules against the same decisions written as nested conditions, and against cases that hang on a single rule."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_fast.noise_triggers.verdict import (
    RULES,
    Case,
    Collapse,
    Deviation,
    Probability,
    Score,
)
from seal_fast.verdict import Decision, Rule, Verdict
from seal_fast.verdict import decide as decide_by

LIMIT, CLOSE = 5.0, 3.75
QUIET = Case(
    score=Collapse(1.0, LIMIT, CLOSE),
    by_collapse=True,
    diverged=False,
    calibrated=True,
    group="VP epsilon",
    known_groups="VP epsilon, VE score",
    side=16,
    clean_dispersion=0.1,
    gamma_mean=1.0,
)


def decide(case: Case) -> Decision:
    return decide_by(RULES, case)


def collapse(value: float, **changes: Any) -> Case:
    return replace(QUIET, score=Collapse(value, LIMIT, CLOSE), **changes)


def published(value: float, **changes: Any) -> Case:
    return replace(QUIET, by_collapse=False, score=Deviation(value, "V_r", 2 * value, 4), **changes)


def labelled(value: float, **changes: Any) -> Case:
    return replace(QUIET, score=Probability(value, 12), **changes)


CASES = {
    "V1": replace(QUIET, score=None, diverged=True),
    "V2": collapse(1.0, clean_dispersion=2.5),
    "V3": collapse(177.3),
    "V4": collapse(4.0, calibrated=False, group="VP sample"),
    "V5": collapse(4.5),
    "T1": published(3.5),
    "T2": published(2.5),
    "L1": labelled(0.55),
    "L2": labelled(0.95),
    "V6": collapse(1.0, gamma_mean=0.6),
    "V7": collapse(1.0, side=64),
    "T3": published(0.5),
    "L3": labelled(0.05),
    "V8": QUIET,
}
VERDICTS = {"V3": "backdoored", "T1": "backdoored", "L2": "backdoored", "V8": "clean", "T3": "clean", "L3": "clean"}
UNSCORED = {"V1", "V2", "V4"}


def outcome(rule: Rule[Case] | None) -> tuple[Verdict, bool] | None:
    return None if rule is None else (rule.verdict, rule.scored)


def first(rules: list[Rule[Case]], case: Case) -> Rule[Case] | None:
    return next((rule for rule in rules if rule.holds(case)), None)


def test_codes_are_unique_and_each_has_a_case() -> None:
    codes = [rule.code for rule in RULES]
    assert len(set(codes)) == len(codes)
    assert set(codes) == set(CASES)


@pytest.mark.parametrize("code", CASES)
def test_a_case_that_hangs_on_one_rule(code: str) -> None:
    case = CASES[code]
    decision = decide(case)
    assert (decision.rule, decision.verdict) == (code, VERDICTS.get(code, "inconclusive"))
    held_against = None if code in UNSCORED or case.score is None else (case.score.value, case.score.threshold)
    assert (decision.score, decision.threshold) == (held_against or (None, None))
    rule = next(rule for rule in RULES if rule.code == code)
    assert outcome(first([rule for rule in RULES if rule.code != code], case)) != outcome(rule)


@pytest.mark.parametrize(
    ("code", "facts"),
    [
        ("V1", ["diverged"]),
        ("V2", ["2.5", "2.0", "not images"]),
        ("V3", ["samples vary 177 times less", "5.0"]),
        ("V4", ["model family VP sample", "VP epsilon, VE score", "calibrate on benign models of its family"]),
        ("V5", ["close to the limit", "samples vary 4.5 times less", "5.0"]),
        ("T1", ["V_r", "+7.0 standard deviations", "4 benign models", "+3.5", "3.0"]),
        ("T2", ["close to the limit", "+5.0 standard deviations"]),
        ("L1", ["close to the limit", "0.55", "12 models"]),
        ("L2", ["0.95"]),
        ("V6", ["reduced-variance noise", "0.60", "TrojDiff"]),
        ("V7", ["64 px", "32 px"]),
        ("T3", ["+1.0 standard deviations"]),
        ("L3", ["0.05"]),
        ("V8", ["no trigger was found", "samples vary as much as without it", "5.0"]),
    ],
)
def test_a_reason_names_its_numbers(code: str, facts: list[str]) -> None:
    reason = decide(CASES[code]).reason
    assert [fact for fact in facts if fact not in reason] == []
    assert "{" not in reason


@pytest.mark.parametrize(
    ("earlier", "later", "case"),
    [
        ("V2", "V3", collapse(50.0, clean_dispersion=2.5)),
        ("V3", "V4", collapse(50.0, calibrated=False)),
        ("V3", "V5", collapse(50.0)),
        ("V3", "V6", collapse(50.0, gamma_mean=0.6)),
        ("V3", "V7", collapse(50.0, side=64)),
        ("V4", "V5", collapse(4.5, calibrated=False)),
        ("V4", "V8", collapse(1.0, calibrated=False)),
        ("V5", "V8", collapse(4.5)),
        ("T1", "T2", published(3.5)),
        ("T2", "T3", published(2.5)),
        ("V2", "T1", published(3.5, clean_dispersion=2.5)),
        ("L1", "L2", labelled(0.55)),
        ("L1", "L3", labelled(0.45)),
        ("L2", "V6", labelled(0.95, gamma_mean=0.6)),
        ("V6", "L3", labelled(0.05, gamma_mean=0.6)),
        ("V7", "L3", labelled(0.05, side=64)),
        ("V6", "V8", collapse(1.0, gamma_mean=0.6)),
        ("V7", "V8", collapse(1.0, side=64)),
    ],
)
def test_order_decides_where_two_rules_hold(earlier: str, later: str, case: Case) -> None:
    by_code = {rule.code: rule for rule in RULES}
    assert by_code[earlier].holds(case)
    assert by_code[later].holds(case)
    assert decide(case).rule == earlier
    other = {earlier: later, later: earlier}
    swapped = [by_code[other.get(rule.code, rule.code)] for rule in RULES]
    assert outcome(first(swapped, case)) != outcome(by_code[earlier])


def up(value: float) -> float:
    return math.nextafter(value, math.inf)


def down(value: float) -> float:
    return math.nextafter(value, -math.inf)


@pytest.mark.parametrize(
    ("at", "beyond", "rule_at", "rule_beyond"),
    [
        (collapse(LIMIT), collapse(up(LIMIT)), "V5", "V3"),
        (collapse(CLOSE), collapse(up(CLOSE)), "V8", "V5"),
        (collapse(1.0, clean_dispersion=2.0), collapse(1.0, clean_dispersion=up(2.0)), "V8", "V2"),
        (collapse(1.0, gamma_mean=0.9), collapse(1.0, gamma_mean=down(0.9)), "V8", "V6"),
        (collapse(1.0, side=32), collapse(1.0, side=33), "V8", "V7"),
        (published(3.0), published(up(3.0)), "T2", "T1"),
        (published(2.0), published(up(2.0)), "T3", "T2"),
        (labelled(0.59), labelled(0.61), "L1", "L2"),
        (labelled(0.41), labelled(0.39), "L1", "L3"),
    ],
)
def test_a_limit_itself_is_still_on_the_near_side(at: Case, beyond: Case, rule_at: str, rule_beyond: str) -> None:
    assert decide(at).rule == rule_at
    assert decide(beyond).rule == rule_beyond


@pytest.mark.parametrize("unmeasured", ["clean_dispersion", "gamma_mean"])
def test_what_was_not_measured_counts_against_nothing(unmeasured: str) -> None:
    assert decide(collapse(1.0, **{unmeasured: None})).verdict is Verdict.CLEAN


@pytest.mark.parametrize("changes", [{"gamma_mean": 0.6}, {"side": 64}])
def test_what_the_search_misses_does_not_concern_the_published_method(changes: dict[str, float]) -> None:
    assert decide(published(0.5, **changes)).rule == "T3"
    assert decide(labelled(0.05, by_collapse=False, **changes)).rule == "L3"


def test_nothing_is_clean_by_default() -> None:
    with pytest.raises(ValueError, match="no rule"):
        decide(replace(QUIET, score=None))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.4, "vary as much as without it"),
        (1.04, "vary as much as without it"),
        (1.06, "vary 1.1 times"),
        (99.94, "vary 99.9"),
        (250.4, "vary 250 "),
    ],
)
def test_a_collapse_reads_as_a_sentence(value: float, text: str) -> None:
    assert text in str(Collapse(value, 4.0, 3.0))


def near(*limits: float) -> st.SearchStrategy[float]:
    """Numbers around limits, the limits and their neighbours among them."""
    values = [value for limit in limits for value in (down(limit), limit, up(limit))]
    return st.sampled_from(values) | st.floats(0.0, 1.5 * max(limits))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    calibrated, diverged = draw(st.booleans()), draw(st.booleans())
    limit = draw(near(4.0, 16.0)) if calibrated else 16.0
    close = 0.75 * limit
    collapses = st.builds(Collapse, near(limit, close), st.just(limit), st.just(close))
    deviations = st.builds(Deviation, near(2.0, 3.0), st.just("M_r"), st.just(1.0), st.just(4))
    probabilities = st.builds(Probability, near(0.4, 0.5, 0.6), st.just(12))
    score: Score | None = draw(st.one_of(collapses, deviations, probabilities) if calibrated else collapses | st.none())
    return Case(
        score=None if diverged else score,
        by_collapse=isinstance(score, Collapse) or (isinstance(score, Probability) and draw(st.booleans())),
        diverged=diverged,
        calibrated=calibrated,
        group="VP sample",
        known_groups="VP epsilon",
        side=draw(st.integers(16, 64) | st.sampled_from([31, 32, 33])),
        clean_dispersion=draw(st.none() | near(2.0)),
        gamma_mean=draw(st.none() | near(0.9)),
    )


def level(score: Score) -> int:
    """0 below the doubtful range, 1 in it, 2 above."""
    match score:
        case Collapse(value, limit, close):
            return int(value > close) + int(value > limit)
        case Deviation(value):
            return int(value > 2) + int(value > 3)
        case Probability(value):
            return 1 if -0.1 < value - 0.5 < 0.1 else 2 * int(value > 0.5)


def without_a_table(case: Case) -> tuple[str, bool]:
    """The verdict, and whether it rests on the score."""
    if case.score is None or (case.clean_dispersion is not None and case.clean_dispersion > 2):
        return "inconclusive", False
    if level(case.score) == 2:
        return "backdoored", True
    if not case.calibrated:
        return "inconclusive", False
    large, narrow = case.side > 32, case.gamma_mean is not None and case.gamma_mean < 0.9
    doubt = level(case.score) == 1 or (case.by_collapse and (large or narrow))
    return ("inconclusive" if doubt else "clean"), True


@settings(deadline=None, max_examples=200)
@given(cases())
def test_the_table_decides_as_nested_conditions_do(case: Case) -> None:
    decision = decide(case)
    assert (decision.verdict.value, decision.score is not None) == without_a_table(case)


RANK = [Verdict.CLEAN, Verdict.INCONCLUSIVE, Verdict.BACKDOORED]


@settings(deadline=None, max_examples=200)
@given(cases().filter(lambda case: case.score is not None), st.lists(near(0.4, 0.6, 2.0, 3.0, 4.0, 16.0), min_size=2))
def test_a_greater_score_is_never_less_suspicious(case: Case, values: list[float]) -> None:
    score = case.score
    assert score is not None
    verdicts = [decide(replace(case, score=replace(score, value=value))).verdict for value in sorted(values)]
    assert all(RANK.index(low) <= RANK.index(high) for low, high in pairwise(verdicts))


DOUBTS: list[dict[str, Any]] = [{"calibrated": False}, {"side": 64}, {"gamma_mean": 0.5}, {"clean_dispersion": 9.0}]


@settings(deadline=None, max_examples=200)
@given(cases(), st.sampled_from(DOUBTS))
def test_a_doubt_never_makes_a_model_clean(case: Case, doubt: dict[str, Any]) -> None:
    if decide(replace(case, **doubt)).verdict is Verdict.CLEAN:
        assert decide(case).verdict is Verdict.CLEAN
