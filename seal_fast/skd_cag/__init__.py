"""SKD-CAG: unlearn a text trigger by self-distillation, guided at the cross-attention maps."""

from seal_fast.skd_cag.attention import CapturedMaps, aggregate, capture
from seal_fast.skd_cag.distillation import Distilled, distill
from seal_fast.skd_cag.maps import PromptMaps, attention_maps
from seal_fast.skd_cag.pairs import PromptPair, Trigger, prompt_pair, prompt_pairs
from seal_fast.skd_cag.settings import UnlearnSettings
from seal_fast.skd_cag.trained_part import save_patch

__all__ = [
    "CapturedMaps",
    "Distilled",
    "PromptMaps",
    "PromptPair",
    "Trigger",
    "UnlearnSettings",
    "aggregate",
    "attention_maps",
    "capture",
    "distill",
    "prompt_pair",
    "prompt_pairs",
    "save_patch",
]
