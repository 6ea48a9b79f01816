"""Verdicts by an ordered table of rules: the first rule that holds decides. Each detector has a table of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    CLEAN = "clean"
    BACKDOORED = "backdoored"
    INCONCLUSIVE = "inconclusive"
    ERROR = "error"


@dataclass(frozen=True)
class Rule[Case]:
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
    holds: Callable[[Case], bool]
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
