"""Noise-space triggers: recover a trigger, decide on the model and on its inputs, unlearn the backdoor."""

from seal_fast.noise_triggers.calibration import Calibration, CalibrationModel, shipped_calibration
from seal_fast.noise_triggers.detection import Evidence, InputDetector, model_evidence
from seal_fast.noise_triggers.reversion import Reversion, TriedCandidate, reverse_trigger
from seal_fast.noise_triggers.scope import NoiseScope, noise_scope
from seal_fast.noise_triggers.search_settings import SearchSettings
from seal_fast.noise_triggers.settings import DEFAULT_PRESET, PRESETS, Settings
from seal_fast.noise_triggers.terd import TerdSettings
from seal_fast.noise_triggers.unlearning import NoiseUnlearnSettings, UnlearnedDenoiser, unlearn_denoiser

__all__ = [
    "DEFAULT_PRESET",
    "PRESETS",
    "Calibration",
    "CalibrationModel",
    "Evidence",
    "InputDetector",
    "NoiseScope",
    "NoiseUnlearnSettings",
    "Reversion",
    "SearchSettings",
    "Settings",
    "TerdSettings",
    "TriedCandidate",
    "UnlearnedDenoiser",
    "model_evidence",
    "noise_scope",
    "reverse_trigger",
    "shipped_calibration",
    "unlearn_denoiser",
]
