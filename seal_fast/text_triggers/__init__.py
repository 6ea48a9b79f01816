"""Text triggers of text-to-image models, and how to unlearn them by self-knowledge distillation (SKD-CAG, arXiv 2508.18235)."""

from seal_fast.text_triggers.pairs import PromptPair, prompt_pair, prompt_pairs
from seal_fast.text_triggers.settings import TextUnlearnSettings
from seal_fast.text_triggers.trained_part import save_patch
from seal_fast.text_triggers.trainer import Distilled, distill
from seal_fast.text_triggers.trigger import TextTrigger

__all__ = [
    "Distilled",
    "PromptPair",
    "TextTrigger",
    "TextUnlearnSettings",
    "distill",
    "prompt_pair",
    "prompt_pairs",
    "save_patch",
]
