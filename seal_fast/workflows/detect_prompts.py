"""Find triggered prompts of a text-to-image pipeline: load it, fit a detector on clean prompts, and apply it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from seal_fast.checkpoints import CheckpointError
from seal_fast.checkpoints.text_to_image import PIPELINE, identify, load_pipeline
from seal_fast.results.environment import tool
from seal_fast.results.prompt_detection import PromptReport
from seal_fast.text_triggers.detection_settings import PromptDetectionSettings
from seal_fast.text_triggers.prompt_detection import PromptDetector
from seal_fast.workflows.capacity import default_device
from seal_fast.workflows.prompts import clean_prompts


def detect_prompts(
    pipeline: Path, prompts: Sequence[str], clean: Sequence[str] | None, settings: PromptDetectionSettings, seed: int
) -> PromptReport:
    """Find out which prompts are triggered.

    Args:
        pipeline: folder of a StableDiffusionPipeline.
        prompts: prompts to examine.
        clean: clean prompts; None for those of the model card, else shipped ones.
        settings: settings of the detector.
        seed: seed of all noise.

    Raises:
        CheckpointError: no pipeline, or one that cannot be loaded.
        ValueError: too few clean prompts.
    """
    if identify(pipeline) != PIPELINE:
        kinds = "prompts need one, and noise inputs need the trigger.safetensors of a scan"
        raise CheckpointError(pipeline, f"no text-to-image pipeline: {kinds}")
    loaded = load_pipeline(pipeline, device=default_device())
    chosen, notes = clean_prompts(clean, pipeline)
    detector = PromptDetector.fitted(loaded.pipeline, chosen, settings, seed=seed)
    return PromptReport(tool(), settings.false_alarm_rate, (*loaded.notes, *notes), tuple(detector(prompts)))
