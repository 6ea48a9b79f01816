"""The two kinds of reversion: their settings, their presets, and how a file names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from typing import Any

from seal_fast.noise_triggers.search_settings import SearchSettings
from seal_fast.noise_triggers.terd import TerdSettings

Settings = TerdSettings | SearchSettings

PRESETS: dict[str, Settings] = {"published": TerdSettings(), "search": SearchSettings()}
DEFAULT_PRESET = "search"

METHODS: dict[str, Settings] = {settings.method: settings for settings in (TerdSettings(), SearchSettings())}
"""Default settings of every method, by the name that `asdict` writes."""


def settings_from(fields: Mapping[str, Any]) -> Settings:
    """The settings that a file holds as `asdict` wrote them; a field that it lacks has its default.

    Raises:
        TypeError: a field that the method does not have.
        ValueError: an unknown method, or a value that is not allowed.
    """
    values = dict(fields)
    method = values.pop("method", None)
    if method not in METHODS:
        raise ValueError(f"the settings name the method {method!r}, not one of {', '.join(METHODS)}")
    loaded: Settings = _with_fields(METHODS[method], values)
    return loaded


def _with_fields(defaults: Any, fields: Mapping[str, Any]) -> Any:
    """A dataclass with some fields replaced; the values of fields that are dataclasses are mappings."""
    values = {}
    for name, value in fields.items():
        default = getattr(defaults, name, None)
        if is_dataclass(default) != isinstance(value, Mapping):
            raise TypeError(f"{type(defaults).__name__}.{name} cannot be {value!r}")
        values[name] = _with_fields(default, value) if is_dataclass(default) else _hashable(value)
    return replace(defaults, **values)


def _hashable(value: object) -> object:
    """Lists, as JSON has them, as tuples."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
