"""Read a checkpoint's model card, and the example prompts in it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import metadata_load

from seal_fast.checkpoints.errors import CheckpointError, refusing
from seal_fast.checkpoints.files import inside

CARD = "README.md"
MAX_CARD_BYTES = 1 << 20
NOT_READABLE = "not readable as a model card"


def captions(folder: Path) -> list[str]:
    """The distinct example prompts of a model card: the texts of Hugging Face's `widget`. Without a card there are none.

    Raises:
        CheckpointError: the card is larger than MAX_CARD_BYTES, lies outside the folder, or has metadata that is not YAML.
    """
    card = _card(folder)
    if card is None:
        return []
    with refusing(card, NOT_READABLE):
        widget = (metadata_load(card) or {}).get("widget")
    texts = [item.get("text") for item in widget if isinstance(item, dict)] if isinstance(widget, list) else []
    return list(dict.fromkeys(text.strip() for text in texts if isinstance(text, str) and text.strip()))


def card_text(path: Path) -> str:
    """The model card of a checkpoint as it came; "" for a file, for a folder without a card, and for a card that is refused."""
    try:
        card = _card(path) if path.is_dir() else None
        if card is None:
            return ""
        with refusing(card, NOT_READABLE):
            return card.read_text(encoding="utf-8")
    except CheckpointError:
        return ""


def _card(folder: Path) -> Path | None:
    """The file of the model card, if there is one.

    Raises:
        CheckpointError: it is larger than MAX_CARD_BYTES, or lies outside the folder.
    """
    card = inside(folder, CARD)
    if card is None:
        return None
    with refusing(card, NOT_READABLE):
        if card.stat().st_size > MAX_CARD_BYTES:
            raise CheckpointError(card, f"a model card of more than {MAX_CARD_BYTES} bytes")
    return card
