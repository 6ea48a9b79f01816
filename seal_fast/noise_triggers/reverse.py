"""The reversion a caller asks for, chosen by its settings."""

from __future__ import annotations

from seal_fast.diffusion import Denoiser
from seal_fast.noise_triggers.reversion import Reversion
from seal_fast.noise_triggers.search import find_firing_trigger
from seal_fast.noise_triggers.settings import SearchSettings, Settings
from seal_fast.noise_triggers.terd import descend_reversed_loss
from seal_fast.training import OnStep, quiet


def reverse_trigger(denoiser: Denoiser, settings: Settings, *, seed: int = 0, on_step: OnStep = quiet) -> Reversion:
    """Revert the trigger a backdoor in `denoiser` would answer to.

    Args:
        denoiser: the suspect model.
        settings: see `PRESETS`; `TerdSettings` descends TERD's reversed loss, `SearchSettings` looks for
            one that fires.
        seed: of the start and of all noise.
        on_step: progress callback (stage, iteration, total, loss per dimension).

    Returns:
        The trigger found, whether or not the model has one: judge it with `seal_fast.noise_triggers.calibration`. A run that
        left the
        floating-point range has finite = False.
    """
    if isinstance(settings, SearchSettings):
        return find_firing_trigger(denoiser, settings, seed=seed, on_step=on_step)
    capture = denoiser.device.type == "cuda"
    return descend_reversed_loss(denoiser, settings, seed=seed, on_step=on_step, capture=capture)
