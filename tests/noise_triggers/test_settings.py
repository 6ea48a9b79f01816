"""Settings of both methods: what is refused, what a file holds, and what is derived from them."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from seal_fast.diffusion import VP, Denoiser
from seal_fast.noise_triggers import DEFAULT_PRESET, PRESETS, SearchSettings, TerdSettings
from seal_fast.noise_triggers.fixed_points import FixedPointSearch
from seal_fast.noise_triggers.joint_inversion import JointInversion
from seal_fast.noise_triggers.probe import Probe
from seal_fast.noise_triggers.settings import Settings, settings_from

REFUSED: dict[str, list[dict[str, Any]]] = {
    "fixed_points": [
        {"timestep_window": 0.0},
        {"initial_means": ()},
        {"initial_rms": (0.0,)},
        {"colour_mean": 0.0},
        {"coarse_grid": 0},
        {"power_iterations": 0},
        {"power_noises": 0},
        {"patches": 0},
        {"patch_noises": 0},
        {"patch_gamma": 0.0},
        {"patch_sides": ()},
        {"patch_grid": 0},
        {"response_gains": (-1.0,)},
        {"fixed_point_iterations": 0},
        {"fixed_point_noises": 1},
        {"gamma_window": 4},
        {"gamma_rate": 0.0},
        {"slope_range": (1.5, 2.0)},
        {"min_gamma": 0.0},
        {"min_rms": 0.0},
        {"max_rms": 0.01},
        {"candidates": 0},
    ],
    "refinement": [{"turns": 0}, {"iterations": 0}, {"learning_rate": 0.0}],
    "inversion": [
        {"initial_means": ()},
        {"initial_rms": 0.0},
        {"start_snr": ()},
        {"start_snr": (0.0,)},
        {"start_iterations": 0},
        {"low_noise_snr": ()},
        {"low_noise_noises": 0},
        {"halving": ()},
        {"halving": ((10, 0),)},
        {"halving": ((0, 4),)},
        {"learning_rate": 0.0},
        {"ranking_factor": 0},
        {"alternations": 0},
        {"trigger_iterations": 0},
        {"trigger_noises": 0},
        {"trigger_snr": ()},
        {"preview_steps": 0},
        {"accept_above": 0.0},
    ],
    "attack_loss": [{"timesteps": 0}, {"snr_window": (3.0, 1.0)}, {"range_weight": -0.1}],
    "test": [
        {"scales": ()},
        {"pilot_samples": 1},
        {"pilot_samples": 8},
        {"confirming_samples": 8},
        {"ancestral_steps": 0},
        {"deterministic_steps": 0},
        {"reject_below": 5.0},
        {"accept_above": 3.0},
        {"pilot_dispersion_ratio": 0.5},
        {"target_fraction": 1.0},
        {"consensus_size": 1},
        {"consensus_size": 16},
        {"reduced_variance_below": 0.0},
    ],
}


@pytest.mark.parametrize(
    ("part", "change"), [(part, change) for part, changes in REFUSED.items() for change in changes], ids=str
)
def test_settings_that_mean_nothing_are_refused(part: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(getattr(SearchSettings(), part), **change)


def changed(settings: Any) -> Any:
    """The settings with a change of every number that is a plain one."""
    values: dict[str, Any] = {}
    for name in (field.name for field in fields(settings) if field.init):
        value = getattr(settings, name)
        if is_dataclass(value):
            values[name] = changed(value)
        elif isinstance(value, bool):
            values[name] = not value
        elif name.endswith(("iterations", "steps", "noises", "turns")):
            values[name] = value + 1
    return replace(settings, **values)


@pytest.mark.parametrize("settings", [*PRESETS.values(), *map(changed, PRESETS.values())], ids=lambda s: s.method)
def test_a_file_gives_back_the_settings_it_was_written_from(settings: Settings) -> None:
    assert settings_from(json.loads(json.dumps(asdict(settings)))) == settings


def test_a_field_that_a_file_lacks_has_its_default() -> None:
    assert settings_from({"method": "published", "batch": 5}) == TerdSettings(batch=5)
    default = SearchSettings()
    brief = replace(default, refinement=replace(default.refinement, turns=1))
    assert settings_from({"method": "search", "refinement": {"turns": 1}}) == brief


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "search", "gains": [1.0]},
        {"method": "search", "test": {"sampler_steps": 3}},
        {"method": "search", "test": 3},
        {"method": "search", "half_precision": {"cpu": True}},
        {"method": "published", "test": {}},
        {"method": "search", "fixed_points": {"patches": "2"}},
        {"method": "search", "refinement": {"learning_rate": None}},
        {"method": "search", "refinement": {"learning_rate": float("inf")}},
        {"method": "search", "fixed_points": {"patches": 1.5}},
        {"method": "search", "refinement": {"turns": [1]}},
    ],
    ids=str,
)
def test_unknown_fields_and_values_of_another_type_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Settings"):
        settings_from(fields)


@pytest.mark.parametrize("fields", [{}, {"method": "fixed-point"}], ids=str)
def test_the_method_must_be_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="method"):
        settings_from(fields)


def test_presets_have_the_names_of_their_methods() -> None:
    assert {name: settings.method for name, settings in PRESETS.items()} == {"search": "search", "published": "published"}
    assert DEFAULT_PRESET == "search"


class NearT(nn.Module):
    """Takes the whole input for noise."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("channels", [1, 3])
def test_numbers_of_starts_are_those_that_the_search_begins_with(channels: int) -> None:
    settings = SearchSettings(half_precision=False)
    probe = Probe(Denoiser(NearT(), VP.linear(), (channels, 9, 8)), 0, settings.half_precision)
    assert len(FixedPointSearch(probe, settings).directions()) == len(settings.fixed_points.starts(channels))
    assert len(JointInversion(probe, settings).starts().mu) == settings.inversion.starts


def test_the_default_search_starts_from_as_many_shifts_as_its_documentation_says() -> None:
    settings = SearchSettings()
    assert len(settings.fixed_points.starts(3)) == 16
    assert settings.inversion.starts == 24
