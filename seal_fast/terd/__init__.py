"""TERD: revert the trigger of a noise-space backdoor, then judge the model and its inputs."""

from seal_fast.terd.calibration import Calibration, CalibrationModel, Judgement, Verdict, shipped_calibration
from seal_fast.terd.detection import Evidence, InputDetector, model_evidence
from seal_fast.terd.reverse import reverse_trigger
from seal_fast.terd.reversion import Reversion
from seal_fast.terd.sealing import Sealed, SealSettings, seal
from seal_fast.terd.settings import DEFAULT_PRESET, PRESETS, FixedPointSettings, ReversionSettings, Settings

__all__ = [
    "DEFAULT_PRESET",
    "PRESETS",
    "Calibration",
    "CalibrationModel",
    "Evidence",
    "FixedPointSettings",
    "InputDetector",
    "Judgement",
    "Reversion",
    "ReversionSettings",
    "SealSettings",
    "Sealed",
    "Settings",
    "Verdict",
    "model_evidence",
    "reverse_trigger",
    "seal",
    "shipped_calibration",
]
