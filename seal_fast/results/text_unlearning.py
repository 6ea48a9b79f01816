"""What an unlearning of text triggers did. Made by `seal_fast.workflows.unlearn_text`; reports only read it."""

from __future__ import annotations

from dataclasses import dataclass

from seal_fast.results.unlearning import UnlearnRun
from seal_fast.text_triggers.evaluation import Evaluation


@dataclass(frozen=True)
class TriggerTokens:
    """What the model sees of a trigger: its tokens, hidden characters escaped."""

    trigger: str
    tokens: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TextUnlearnReport(Evaluation, UnlearnRun):
    """What an unlearning did, and how.

    Attributes:
        module: what was trained, "unet" or "text_encoder".
        module_reason: why that one.
        triggers: with their tokens.
        losses: of the last tenth of the training: prediction, attention, preservation.
    """

    module: str
    module_reason: str
    triggers: tuple[TriggerTokens, ...]
    losses: dict[str, float]
