"""Generation, latents and cross-attention maps of text-to-image pipelines."""

from seal_fast.text_to_image.attention import CapturedMaps, aggregate, capture
from seal_fast.text_to_image.maps import PromptMaps, attention_maps

__all__ = ["CapturedMaps", "PromptMaps", "aggregate", "attention_maps", "capture"]
