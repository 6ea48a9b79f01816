"""TERD: revert the trigger of a noise-space backdoor, then judge the model and its inputs."""

from seal_fast.noise_triggers.calibration import Calibration, CalibrationModel, shipped_calibration
from seal_fast.noise_triggers.detection import Evidence, InputDetector, model_evidence
from seal_fast.noise_triggers.reverse import reverse_trigger
from seal_fast.noise_triggers.reversion import Reversion
from seal_fast.noise_triggers.settings import DEFAULT_PRESET, PRESETS, SearchSettings, Settings, TerdSettings
from seal_fast.noise_triggers.unlearning import NoiseUnlearnSettings, UnlearnedDenoiser, unlearn_denoiser
from seal_fast.noise_triggers.verdict import Decision, Verdict

__all__ = [
    "DEFAULT_PRESET",
    "PRESETS",
    "Calibration",
    "CalibrationModel",
    "Decision",
    "Evidence",
    "InputDetector",
    "NoiseUnlearnSettings",
    "Reversion",
    "SearchSettings",
    "Settings",
    "TerdSettings",
    "UnlearnedDenoiser",
    "Verdict",
    "model_evidence",
    "reverse_trigger",
    "shipped_calibration",
    "unlearn_denoiser",
]
