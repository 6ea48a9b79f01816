"""The reversion a caller asks for, chosen by its settings."""

from __future__ import annotations

from seal_fast.diffusion import Denoiser
from seal_fast.terd.reversed_loss import descend_reversed_loss
from seal_fast.terd.reversion import Reversion
from seal_fast.terd.search import find_firing_trigger
from seal_fast.terd.settings import FixedPointSettings, Settings
from seal_fast.training import OnStep, quiet


def reverse_trigger(denoiser: Denoiser, settings: Settings, *, seed: int = 0, on_step: OnStep = quiet) -> Reversion:
    """Revert the trigger a backdoor in `denoiser` would answer to.

    Args:
        denoiser: the suspect model.
        settings: see `PRESETS`; `ReversionSettings` descends TERD's reversed loss, `FixedPointSettings` looks for
            one that fires.
        seed: of the start and of all noise.
        on_step: progress callback (stage, iteration, total, loss per dimension).

    Returns:
        The trigger found, whether or not the model has one: judge it with `seal_fast.terd.calibration`. A run that left the
        floating-point range has finite = False.
    """
    if isinstance(settings, FixedPointSettings):
        return find_firing_trigger(denoiser, settings, seed=seed, on_step=on_step)
    capture = denoiser.device.type == "cuda"
    return descend_reversed_loss(denoiser, settings, seed=seed, on_step=on_step, capture=capture)
