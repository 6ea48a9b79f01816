"""Find triggered prompts of a text-to-image pipeline: load it, fit a detector on clean prompts, and apply it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from seal_fast.checkpoints.text_to_image import load_pipeline
from seal_fast.text_triggers.prompt_detection import PromptDetection, PromptDetectionSettings, PromptDetector
from seal_fast.workflows.capacity import default_device
from seal_fast.workflows.prompts import choose_prompts


def detect_prompts(
    pipeline: Path, prompts: Sequence[str], clean: Sequence[str] | None, settings: PromptDetectionSettings, seed: int
) -> list[PromptDetection]:
    """Find out which prompts are triggered.

    Args:
        pipeline: folder of a StableDiffusionPipeline.
        prompts: prompts to examine.
        clean: clean prompts; None for those of the model card, else shipped ones.
        settings: settings of the detector.
        seed: seed of all noise.

    Raises:
        CheckpointError: the pipeline cannot be loaded.
        ValueError: too few clean prompts.
    """
    loaded = load_pipeline(pipeline, device=default_device()).pipeline
    training, held_out, _ = choose_prompts(clean, pipeline)
    return PromptDetector.fitted(loaded, [*training, *held_out], settings, seed=seed)(prompts)
