"""Find backdoors in diffusion checkpoints and unlearn them, fast.

Names are imported when first used, so that `import seal_fast` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from seal_fast.version import __version__

if TYPE_CHECKING:
    from seal_fast import ops as ops
    from seal_fast.checkpoints import CheckpointError as CheckpointError
    from seal_fast.checkpoints import load_denoiser as load_denoiser
    from seal_fast.checkpoints.trigger import Trigger as Trigger
    from seal_fast.diffusion import Denoiser as Denoiser
    from seal_fast.noise_triggers import PRESETS as PRESETS
    from seal_fast.noise_triggers import Calibration as Calibration
    from seal_fast.noise_triggers import Evidence as Evidence
    from seal_fast.noise_triggers import InputDetector as InputDetector
    from seal_fast.noise_triggers import NoiseUnlearnSettings as NoiseUnlearnSettings
    from seal_fast.noise_triggers import SearchSettings as SearchSettings
    from seal_fast.noise_triggers import TerdSettings as TerdSettings
    from seal_fast.noise_triggers import reverse_trigger as reverse_trigger
    from seal_fast.noise_triggers import shipped_calibration as shipped_calibration
    from seal_fast.results.scan import ModelResult as ModelResult
    from seal_fast.results.scan import ScanReport as ScanReport
    from seal_fast.text_to_image import PromptMaps as PromptMaps
    from seal_fast.text_to_image import attention_maps as attention_maps
    from seal_fast.text_triggers import TextTrigger as TextTrigger
    from seal_fast.text_triggers import TextUnlearnSettings as TextUnlearnSettings
    from seal_fast.text_triggers.detection_settings import PromptDetectionSettings as PromptDetectionSettings
    from seal_fast.text_triggers.evaluation import EvaluationSettings as EvaluationSettings
    from seal_fast.text_triggers.findings import TextSearch as TextSearch
    from seal_fast.text_triggers.prompt_detection import PromptDetection as PromptDetection
    from seal_fast.text_triggers.prompt_detection import PromptDetector as PromptDetector
    from seal_fast.text_triggers.prompt_detection import PromptVerdict as PromptVerdict
    from seal_fast.text_triggers.search import find_text_triggers as find_text_triggers
    from seal_fast.text_triggers.search_settings import Budget as Budget
    from seal_fast.text_triggers.search_settings import TextSearchSettings as TextSearchSettings
    from seal_fast.verdict import Verdict as Verdict
    from seal_fast.workflows.scan import scan as scan
    from seal_fast.workflows.unlearn import UnlearnResult as UnlearnResult
    from seal_fast.workflows.unlearn import run_unlearning as run_unlearning
    from seal_fast.workflows.unlearn import unlearn as unlearn
    from seal_fast.workflows.unlearn_noise import NoiseUnlearning as NoiseUnlearning
    from seal_fast.workflows.unlearn_text import TextUnlearning as TextUnlearning

_MODULE_OF = {
    "Budget": "text_triggers.search_settings",
    "Calibration": "noise_triggers",
    "CheckpointError": "checkpoints",
    "Denoiser": "diffusion",
    "EvaluationSettings": "text_triggers.evaluation",
    "Evidence": "noise_triggers",
    "InputDetector": "noise_triggers",
    "ModelResult": "results.scan",
    "NoiseUnlearnSettings": "noise_triggers",
    "NoiseUnlearning": "workflows.unlearn_noise",
    "PRESETS": "noise_triggers",
    "PromptDetection": "text_triggers.prompt_detection",
    "PromptDetectionSettings": "text_triggers.detection_settings",
    "PromptDetector": "text_triggers.prompt_detection",
    "PromptVerdict": "text_triggers.prompt_detection",
    "PromptMaps": "text_to_image",
    "ScanReport": "results.scan",
    "SearchSettings": "noise_triggers",
    "TerdSettings": "noise_triggers",
    "TextSearch": "text_triggers.findings",
    "TextSearchSettings": "text_triggers.search_settings",
    "TextTrigger": "text_triggers",
    "TextUnlearnSettings": "text_triggers",
    "TextUnlearning": "workflows.unlearn_text",
    "Trigger": "checkpoints.trigger",
    "UnlearnResult": "workflows.unlearn",
    "Verdict": "verdict",
    "attention_maps": "text_to_image",
    "find_text_triggers": "text_triggers.search",
    "load_denoiser": "checkpoints",
    "reverse_trigger": "noise_triggers",
    "run_unlearning": "workflows.unlearn",
    "scan": "workflows.scan",
    "shipped_calibration": "noise_triggers",
    "unlearn": "workflows.unlearn",
}

__all__ = ["__version__", "ops", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("seal_fast.ops")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'seal_fast' has no attribute {name!r}")
    value = getattr(import_module(f"seal_fast.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
