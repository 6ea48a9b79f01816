"""Which module of a text-to-image pipeline holds a backdoor: the text encoder or the UNet?

A text encoder that is taught to read triggered prompts as one target prompt (Rickrolling) gives different prompts the same
hidden states: they collapse, as samples do under a noise trigger. One that is not taught so keeps them apart, however far an
unknown word moves them, and the effect must come from the UNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from seal_fast.text_triggers.control_triggers import WORDS
from seal_fast.text_triggers.pairs import PromptPair, prompt_pair
from seal_fast.text_triggers.trigger import Position, TextTrigger

COLLAPSES = 4.0
"""From this many times on the text encoder holds the backdoor. A poisoned one of the zoo reached 84 with its trigger, 2.8 with
others, a clean one 1.2. How far states move does not tell: a clean one moved up to 4.9 times as far as with harmless words."""
PROMPTS = 32


@dataclass(frozen=True)
class Location:
    """Where a backdoor seems to sit.

    Attributes:
        module: "text_encoder" or "unet".
        collapse: how many times more alike the trigger makes the hidden states of different prompts than any harmless words in
            its place do; 1 where there is only one prompt, which tells nothing.
    """

    module: Literal["unet", "text_encoder"]
    collapse: float


def locate(pipeline: Any, triggers: Sequence[TextTrigger], prompts: Sequence[str]) -> Location:
    """EffectDetector by the trigger that collapses the text encoder most, in the first PROMPTS prompts that it fits.

    Raises:
        ValueError: a trigger that the tokenizer does not see, or that fits no prompt.
    """
    collapse = max(_collapse(pipeline, trigger, prompts) for trigger in triggers)
    return Location("text_encoder" if collapse > COLLAPSES else "unet", collapse)


@torch.no_grad()
def _collapse(pipeline: Any, trigger: TextTrigger, prompts: Sequence[str]) -> float:
    generator = torch.Generator().manual_seed(0)
    place: Position = "start" if trigger.replaces is None else "all"
    chosen = trigger.fitting(prompts)[:PROMPTS]
    pairs = [prompt_pair(pipeline.tokenizer, prompt, trigger, place, generator) for prompt in chosen]
    if len(pairs) < 2:
        return 1.0
    readings = torch.stack([_states(pipeline, pairs, first) for first in (None, *range(len(WORDS)))])
    # states before a trigger cannot see it
    begun = max(1 + _changed(pair).index(True) for pair in pairs)
    triggered, *harmless = readings[:, :, begun:].var(dim=1).mean(dim=(1, 2))
    return float(min(harmless) / triggered)


def _changed(pair: PromptPair) -> list[bool]:
    """For every content token of the triggered prompt whether the trigger made it."""
    return [
        partner is None or pair.triggered_ids[1 + place] != pair.teacher_ids[1 + partner]
        for place, partner in enumerate(pair.partners)
    ]


def _states(pipeline: Any, pairs: Sequence[PromptPair], first: int | None) -> Tensor:
    """Hidden states [N,L,D] of the triggered prompts, with harmless tokens from word `first` on in the trigger's place.

    Made of token ids, so that no word moves: its position alone changes a state.
    """
    words = [*WORDS[first:], *WORDS[:first]]
    harmless = pipeline.tokenizer(" ".join(words), add_special_tokens=False).input_ids
    ids = torch.tensor([pair.triggered_ids for pair in pairs])
    if first is not None:
        for row, pair in zip(ids, pairs, strict=True):
            places = [1 + place for place, changed in enumerate(_changed(pair)) if changed]
            row[places] = torch.tensor([harmless[i % len(harmless)] for i in range(len(places))])
    return pipeline.text_encoder(ids.to(pipeline.device)).last_hidden_state.float()
