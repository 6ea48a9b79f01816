"""What a checkpoint's model card says."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import metadata_load

from seal_fast.checkpoints.errors import CheckpointError, refusing
from seal_fast.checkpoints.files import inside

CARD = "README.md"
MAX_CARD_BYTES = 1 << 20


def captions(folder: Path) -> list[str]:
    """The different prompts that a model's card shows it with: the texts of Hugging Face's `widget`; none without a card.

    Raises:
        CheckpointError: a card that is larger than MAX_CARD_BYTES, leaves the folder, or has metadata that is no YAML.
    """
    card = inside(folder, CARD)
    if card is None:
        return []
    with refusing(card, "not readable as a model card"):
        if card.stat().st_size > MAX_CARD_BYTES:
            raise CheckpointError(card, f"more than {MAX_CARD_BYTES} bytes of model card")
        shown = (metadata_load(card) or {}).get("widget")
    texts = [one.get("text") for one in shown if isinstance(one, dict)] if isinstance(shown, list) else []
    return list(dict.fromkeys(text.strip() for text in texts if isinstance(text, str) and text.strip()))
