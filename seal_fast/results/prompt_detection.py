"""What a prompt detector says of prompts. `seal_fast.workflows.detect_prompts` makes it; reports only read it."""

from __future__ import annotations

from dataclasses import dataclass

from seal_fast.text_triggers.prompt_detection import PromptDetection, PromptVerdict


@dataclass(frozen=True)
class PromptReport:
    """What a prompt detector says of prompts.

    Attributes:
        tool: name and version of this program.
        false_alarm_rate: share of harmless prompts that may count as triggered.
        notes: assumptions that the loader made, and where the clean prompts come from.
        prompts: what it says of each prompt, in their order.
    """

    tool: dict[str, str]
    false_alarm_rate: float
    notes: tuple[str, ...]
    prompts: tuple[PromptDetection, ...]

    @property
    def summary(self) -> dict[str, int]:
        """Verdict -> number of prompts."""
        return {verdict.value: sum(one.verdict is verdict for one in self.prompts) for verdict in PromptVerdict}
