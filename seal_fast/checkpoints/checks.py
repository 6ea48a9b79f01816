"""Predicates for the values of an untrusted config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Check = Callable[[Any], bool]


def integer(low: int, high: int) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def number(low: float, high: float) -> Check:
    return lambda value: type(value) in (int, float) and low <= value <= high


def one_of(*choices: Any) -> Check:
    return lambda value: type(value) in (str, bool, type(None)) and value in choices


def list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and 1 <= len(value) <= 16 and all(map(check, value))


def either(*checks: Check) -> Check:
    return lambda value: any(check(value) for check in checks)


NOTHING = one_of(None)
FLAG = one_of(True, False)
WIDTH = integer(1, 16384)
SIZE = integer(1, 4096)
