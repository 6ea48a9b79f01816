"""Read the example prompts of a checkpoint's model card."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import metadata_load

from seal_fast.checkpoints.errors import CheckpointError, refusing
from seal_fast.checkpoints.files import inside

CARD = "README.md"
MAX_CARD_BYTES = 1 << 20


def captions(folder: Path) -> list[str]:
    """The distinct example prompts of a model card: the texts of Hugging Face's `widget`. Without a card there are none.

    Raises:
        CheckpointError: the card is larger than MAX_CARD_BYTES, lies outside the folder, or has metadata that is not YAML.
    """
    card = inside(folder, CARD)
    if card is None:
        return []
    with refusing(card, "not readable as a model card"):
        if card.stat().st_size > MAX_CARD_BYTES:
            raise CheckpointError(card, f"a model card of more than {MAX_CARD_BYTES} bytes")
        widget = (metadata_load(card) or {}).get("widget")
    texts = [item.get("text") for item in widget if isinstance(item, dict)] if isinstance(widget, list) else []
    return list(dict.fromkeys(text.strip() for text in texts if isinstance(text, str) and text.strip()))
