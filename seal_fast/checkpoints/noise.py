"""Read a noise process from a scheduler config."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seal_fast.checkpoints.errors import CheckpointError, refusing
from seal_fast.diffusion import EDM, VE, VP, NoiseProcess

VP_SCHEDULERS = frozenset(
    f"{name}Scheduler"
    for name in (
        *("DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "DDIMInverse", "PNDM", "DEISMultistep", "UniPCMultistep", "SASolver"),
        *("DPMSolverMultistep", "DPMSolverMultistepInverse", "DPMSolverSinglestep", "DPMSolverSDE", "RePaint"),
        *("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"),
    )
)
"""Schedulers that sample a VP process, which they all define by betas."""
EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")

MAX_TIMESTEPS = 100_000
MAX_SIGMA = 1e6
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


def default_process(notes: list[str]) -> NoiseProcess:
    """DDPM's schedule, for a checkpoint without a scheduler config."""
    notes.append("no scheduler config: linear betas 1e-4..0.02, 1000 timesteps, epsilon prediction assumed")
    return VP.linear()


def process_from_config(config: Mapping[str, Any], path: Path, notes: list[str]) -> NoiseProcess:
    """The noise process of an untrusted diffusers scheduler config; CheckpointError if it is unknown or impossible."""
    name = config.get("_class_name")
    with refusing(path, "describes no noise process"):
        if name in VP_SCHEDULERS:
            return _vp(config)
        if name == "ScoreSdeVeScheduler":
            notes.append("variance exploding: images lie in [0, 1]")
            low, high = _sigmas(config, 0.01, 1348.0)
            return VE.geometric(low, high, _timesteps(config, 2000))
        if name in EDM_SCHEDULERS:
            return _edm(config)
    raise CheckpointError(path, f"scheduler {reprlib.repr(name)} is not supported")


def _vp(config: Mapping[str, Any]) -> VP:
    steps = _timesteps(config, 1000)
    for key, default in (("beta_start", 1e-4), ("beta_end", 0.02)):
        _number(config, key, default, 1.0)
    betas = config.get("trained_betas")
    if betas is not None and not (isinstance(betas, list) and len(betas) == steps and all(_between(b, 1.0) for b in betas)):
        raise ValueError(f"trained_betas must be {steps} numbers in (0, 1)")
    if config.get("beta_schedule", "linear") not in SCHEDULES:
        raise ValueError(f"beta_schedule must be one of {SCHEDULES}")
    for key in ("use_flow_sigmas", "rescale_betas_zero_snr"):
        if type(config.get(key, False)) not in (bool, type(None)):
            raise ValueError(f"{key} must be true or false")
    if config.get("use_flow_sigmas"):
        raise ValueError("flow matching is not supported")
    return VP.from_scheduler_config(config)


def _edm(config: Mapping[str, Any]) -> EDM:
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise ValueError("EDM with a prediction_type other than epsilon is not supported")
    low, high = _sigmas(config, 0.002, 80.0)
    rho, sigma_data = _number(config, "rho", 7.0, 100.0), _number(config, "sigma_data", 0.5, MAX_SIGMA)
    return EDM.karras(low, high, _timesteps(config, 1000), rho, sigma_data)


def _timesteps(config: Mapping[str, Any], default: int) -> int:
    steps = config.get("num_train_timesteps", default)
    if type(steps) is not int or not 2 <= steps <= MAX_TIMESTEPS:
        raise ValueError(f"num_train_timesteps must be an integer between 2 and {MAX_TIMESTEPS}, not {reprlib.repr(steps)}")
    return steps


def _sigmas(config: Mapping[str, Any], low: float, high: float) -> tuple[float, float]:
    low, high = _number(config, "sigma_min", low, MAX_SIGMA), _number(config, "sigma_max", high, MAX_SIGMA)
    if low >= high:
        raise ValueError("sigma_min must be below sigma_max")
    return low, high


def _number(config: Mapping[str, Any], key: str, default: float, below: float) -> float:
    value = config.get(key, default)
    if not _between(value, below):
        raise ValueError(f"{key} must be a number in (0, {below}), not {reprlib.repr(value)}")
    return float(value)


def _between(value: Any, below: float) -> bool:
    return type(value) in (int, float) and 0 < value < below
