"""Verdicts by an ordered table of rules: the first rule that holds decides. Each detector has a table of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, Protocol, TypeVar


class Verdict(StrEnum):
    CLEAN = "clean"
    BACKDOORED = "backdoored"
    INCONCLUSIVE = "inconclusive"
    ERROR = "error"


class Score(Protocol):
    """What is compared with a limit.

    Attributes:
        value: the score.
        threshold: a greater score means backdoored.
    """

    @property
    def value(self) -> float: ...

    @property
    def threshold(self) -> float: ...


class Case(Protocol):
    """What the rules know of a model.

    Attributes:
        score: what is compared with a limit; None if the decision rests on no score.
    """

    @property
    def score(self) -> Score | None: ...


C = TypeVar("C", bound=Case)


@dataclass(frozen=True)
class Rule(Generic[C]):
    """One entry of a table.

    Attributes:
        code: stable name of the rule in reports.
        verdict: the verdict if the rule is the first that holds.
        holds: the condition.
        message: the reason for a user; a format string over `case`.
        scored: whether the decision rests on the case's score.
    """

    code: str
    verdict: Verdict
    holds: Callable[[C], bool]
    message: str
    scored: bool = True


@dataclass(frozen=True)
class Decision:
    """A verdict with its grounds.

    Attributes:
        verdict: clean, backdoored or inconclusive.
        score: what was compared with `threshold`; None if the decision does not rest on a score.
        threshold: a greater score means backdoored; None without a score.
        rule: code of the rule that decided.
        reason: why, as a sentence for a user.
    """

    verdict: Verdict
    score: float | None
    threshold: float | None
    rule: str
    reason: str


def decide(rules: Sequence[Rule[C]], case: C) -> Decision:
    """The decision of the first rule that holds.

    Raises:
        ValueError: no rule holds. Nothing is clean by default.
    """
    rule = next((rule for rule in rules if rule.holds(case)), None)
    if rule is None:
        raise ValueError(f"no rule decides on {case}")
    score = case.score if rule.scored else None
    return Decision(
        rule.verdict,
        None if score is None else score.value,
        None if score is None else score.threshold,
        rule.code,
        rule.message.format(case=case),
    )
