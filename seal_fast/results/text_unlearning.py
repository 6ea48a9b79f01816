"""The report of an unlearning of text triggers. Made by `seal_fast.workflows.unlearn_text`; reports only read it."""

from __future__ import annotations

from dataclasses import dataclass

from seal_fast.results.unlearning import UnlearnReport
from seal_fast.text_triggers.evaluation import Evaluation


@dataclass(frozen=True)
class TriggerTokens:
    """The tokens that a model's tokenizer makes of a trigger."""

    trigger: str
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class TrainingLosses:
    """Mean of each loss term over the last tenth of the training, see `seal_fast.text_triggers.Distilled`."""

    prediction: float
    attention: float
    preservation: float


@dataclass(frozen=True, kw_only=True)
class TextUnlearnReport(Evaluation, UnlearnReport):
    """How text triggers were unlearned.

    Attributes:
        module: the trained module, "unet" or "text_encoder".
        module_reason: why this module was trained.
        triggers: the triggers with their tokens.
        losses: losses at the end of the training.
    """

    module: str
    module_reason: str
    triggers: tuple[TriggerTokens, ...]
    losses: TrainingLosses
