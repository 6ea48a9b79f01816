"""The two kinds of reversion: their settings, their presets, and how a file names them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from seal_fast.noise_triggers.search_settings import SearchSettings
from seal_fast.noise_triggers.terd import TerdSettings
from seal_fast.typed_json import from_json

Settings = TerdSettings | SearchSettings

PRESETS: dict[str, Settings] = {"published": TerdSettings(), "search": SearchSettings()}
DEFAULT_PRESET = "search"

METHODS: dict[str, type[Settings]] = {kind().method: kind for kind in (TerdSettings, SearchSettings)}
"""The settings of every method, by the name that `asdict` writes."""


def settings_from(fields: Mapping[str, Any]) -> Settings:
    """The settings that a file holds as `asdict` wrote them; a field that it lacks has its default.

    Raises:
        ValueError: an unknown method or field, or a value that is not allowed.
    """
    values = dict(fields)
    method = values.pop("method", None)
    if method not in METHODS:
        raise ValueError(f"the settings name the method {method!r}, not one of {', '.join(METHODS)}")
    loaded: Settings = from_json(METHODS[method], values)
    try:
        # null was read as NaN, which passes every comparison
        json.dumps(asdict(loaded), allow_nan=False)
    except ValueError as error:
        raise ValueError(f"a number of {type(loaded).__name__} is not finite") from error
    return loaded
