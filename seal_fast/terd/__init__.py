"""TERD: revert the trigger of a noise-space backdoor, then judge the model and its inputs."""

from seal_fast.terd.calibration import Calibration, CalibrationModel, Judgement, Verdict, shipped_calibration
from seal_fast.terd.detection import Evidence, InputDetector, model_evidence
from seal_fast.terd.reversion import Reversion, reverse_trigger
from seal_fast.terd.settings import DEFAULT_PRESET, PRESETS, ReversionSettings

__all__ = [
    "DEFAULT_PRESET",
    "PRESETS",
    "Calibration",
    "CalibrationModel",
    "Evidence",
    "InputDetector",
    "Judgement",
    "Reversion",
    "ReversionSettings",
    "Verdict",
    "model_evidence",
    "reverse_trigger",
    "shipped_calibration",
]
