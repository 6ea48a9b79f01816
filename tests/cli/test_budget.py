from __future__ import annotations

import pytest
import typer

from seal_fast.cli.budget import parse_budget
from seal_fast.text_triggers.search_settings import Budget


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("200000", Budget(evaluations=200_000)),
        ("90s", Budget(seconds=90.0)),
        ("30m", Budget(seconds=1800.0)),
        ("1.5h", Budget(seconds=5400.0)),
    ],
)
def test_evaluations_or_a_time(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "0", "0m", "-5", "1.5", "10 m", "10d", "1e9", "nan", "٣", "9" * 30])
def test_anything_else_is_a_usage_error(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="30m"):
        parse_budget(text)
