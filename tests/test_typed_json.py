"""JSON that is read back as the dataclasses it was written from."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_fast.report.json import to_json
from seal_fast.typed_json import from_json


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Point:
    x: float
    y: float


@dataclass(frozen=True)
class Named:
    name: str


@dataclass(frozen=True)
class Everything:
    count: int
    flag: bool
    colour: Colour
    side: Literal["left", "right"]
    points: tuple[Point, ...]
    shape: tuple[int, int, str]
    either: Point | Named | None
    maybe: float | None
    more: str = "more"


WHOLE = Everything(3, True, Colour.BLUE, "left", (Point(1.0, 2.5), Point(0.0, -1.0)), (1, 2, "x"), Named("n"), None)
POINTS = st.builds(Point, st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
ALL = st.builds(
    Everything,
    st.integers(),
    st.booleans(),
    st.sampled_from(Colour),
    st.sampled_from(["left", "right"]),
    st.lists(POINTS, max_size=3).map(tuple),
    st.tuples(st.integers(), st.integers(), st.text()),
    st.none() | POINTS | st.builds(Named, st.text()),
    st.none() | st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
)


@given(ALL)
def test_what_was_written_is_read_back(value: Everything) -> None:
    assert from_json(Everything, json.loads(to_json(asdict(value)))) == value


def test_a_default_may_be_left_out_and_nan_comes_back() -> None:
    fields = json.loads(to_json(asdict(replace(WHOLE, points=(Point(math.nan, 1.0),)))))
    del fields["more"]
    read = from_json(Everything, fields)
    assert read.more == "more"
    assert math.isnan(read.points[0].x)
    assert read.points[0].y == 1.0


WRONG: dict[str, dict[str, Any]] = {
    "no int": {"count": True},
    "float for int": {"count": 1.0},
    "int for bool": {"flag": 1},
    "null for str": {"more": None},
    "unknown member": {"colour": "green"},
    "list for a member": {"colour": ["red"]},
    "unknown literal": {"side": "up"},
    "object for a literal": {"side": {}},
    "text for a tuple": {"points": "ab"},
    "wrong item": {"points": [{"x": 1, "y": 2}, 3]},
    "wrong field of an item": {"points": [{"x": 1, "y": "2"}]},
    "missing field of an item": {"points": [{"x": 1}]},
    "length": {"shape": [1, 2]},
    "none of a union": {"either": {"x": 1}},
    "an int that no float holds": {"maybe": 10**400},
    "unknown": {"surprise": 1},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=list(WRONG))
def test_anything_else_is_a_value_error(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Everything"):
        from_json(Everything, asdict(WHOLE) | {"points": [], "shape": [1, 2, "x"]} | change)


@pytest.mark.parametrize("value", [None, 3, [], "text", {}])
def test_what_is_no_object_of_its_fields(value: object) -> None:
    with pytest.raises(ValueError, match="Everything"):
        from_json(Everything, value)
