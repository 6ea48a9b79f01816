"""Read JSON as the dataclasses that it was written from. Safe for JSON of unknown origin."""

from __future__ import annotations

import math
import types
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_json(kind: type[T], value: Any) -> T:
    """The dataclass of type `kind` whose `dataclasses.asdict` became `value` in JSON.

    Fields may be dataclasses, tuples of one type, unions, literals, enumerations, str, bool, int, float and None. A union is
    read as the first of its types that fits. null in the place of a float is NaN, which JSON does not have.

    Raises:
        ValueError: a field is missing, unknown or of another type; or the dataclass refuses its values.
    """
    read: T = _read(kind, value, kind.__name__)
    return read


def _read(kind: Any, value: Any, at: str) -> Any:
    if is_dataclass(kind):
        return _dataclass(kind, value, at)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _union(arguments, value, at)
    if origin is tuple:
        return _tuple(arguments, value, at)
    if origin is Literal:
        # True == 1, and a list is not hashable
        if type(value) is str and value in arguments:
            return value
    elif isinstance(kind, type) and issubclass(kind, Enum):
        if value in [member.value for member in kind]:
            return kind(value)
    elif kind is float:
        # an int may be too large for a float
        if value is None or type(value) is float or (type(value) is int and abs(value) < 1 << 53):
            return math.nan if value is None else float(value)
    elif kind is type(None):
        if value is None:
            return None
    elif kind in (str, bool, int) and type(value) is kind:
        return value
    raise ValueError(f"{at}: {getattr(kind, '__name__', kind)} expected, not {type(value).__name__}")


def _dataclass(kind: Any, value: Any, at: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{at}: an object expected, not {type(value).__name__}")
    needed = {field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING}
    types_of = get_type_hints(kind)
    known = {field.name for field in fields(kind)}
    if missing := needed - value.keys():
        raise ValueError(f"{at}: no {min(missing)}")
    if unknown := value.keys() - known:
        raise ValueError(f"{at}: an unknown {min(unknown)[:80]!r}")
    return kind(**{name: _read(types_of[name], item, f"{at}.{name}") for name, item in value.items()})


def _tuple(arguments: tuple[Any, ...], value: Any, at: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{at}: a list expected, not {type(value).__name__}")
    kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
    if len(kinds) != len(value):
        raise ValueError(f"{at}: {len(kinds)} items expected, not {len(value)}")
    return tuple(_read(kind, item, f"{at}[{number}]") for number, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _union(kinds: tuple[Any, ...], value: Any, at: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    problems = []
    for kind in kinds:
        try:
            return _read(kind, value, at)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError(problems[0])
