"""Which module of a text-to-image pipeline holds a backdoor: the text encoder or the UNet?

A text encoder with a backdoor that reads triggered prompts as one target prompt (Rickrolling) gives different prompts the same
hidden states. This is measured as a diversity collapse: how many times less the hidden states vary with the trigger than with
control words in its place. A text encoder without such a backdoor keeps the prompts apart, however far an unknown word moves
their states. Then the effect must come from the UNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from seal_fast.text_to_image.prompts import content_ids
from seal_fast.text_triggers.control_triggers import WORDS
from seal_fast.text_triggers.pairs import PromptPair, prompt_pair
from seal_fast.text_triggers.trigger import Position, TextTrigger

COLLAPSE_LIMIT = 4.0
"""Diversity collapse above which the text encoder holds the backdoor. A backdoored text encoder of the zoo reached 84 with its
trigger and 2.8 with other triggers, a clean one 1.2. The distance that states move is no criterion: in a clean text encoder a
trigger moved them up to 4.9 times as far as control words did."""
PROMPTS = 32
"""Prompts that the collapse is measured on, at most."""


@dataclass(frozen=True)
class Location:
    """The module that holds a backdoor.

    Attributes:
        module: "text_encoder" or "unet".
        collapse: how many times less the hidden states of different prompts vary with the trigger than with any control words
            in its place; 1 if there is only one prompt, on which nothing can be measured.
    """

    module: Literal["unet", "text_encoder"]
    collapse: float


def locate(pipeline: Any, triggers: Sequence[TextTrigger], prompts: Sequence[str]) -> Location:
    """Locate the backdoor by the trigger with the largest diversity collapse, in the first PROMPTS prompts that it fits.

    Raises:
        ValueError: a trigger that the tokenizer drops, or that fits no prompt.
    """
    collapse = max(_collapse(pipeline, trigger, prompts) for trigger in triggers)
    return Location("text_encoder" if collapse > COLLAPSE_LIMIT else "unet", collapse)


@torch.no_grad()
def _collapse(pipeline: Any, trigger: TextTrigger, prompts: Sequence[str]) -> float:
    generator = torch.Generator().manual_seed(0)
    position: Position = "start" if trigger.replaces is None else "all"
    chosen = trigger.fitting(prompts)[:PROMPTS]
    pairs = [prompt_pair(pipeline.tokenizer, prompt, trigger, position, generator) for prompt in chosen]
    if len(pairs) < 2:
        return 1.0
    states = torch.stack([_states(pipeline, pairs, first) for first in (None, *range(len(WORDS)))])
    # a text encoder looks only to the left, so states before the trigger do not depend on it
    begin = max(1 + _trigger_tokens(pair).index(True) for pair in pairs)
    triggered, *controls = states[:, :, begin:].var(dim=1).mean(dim=(1, 2))
    return float(min(controls) / triggered)


def _trigger_tokens(pair: PromptPair) -> list[bool]:
    """Whether the trigger added or changed the token, for every content token of the triggered prompt."""
    return [
        clean is None or pair.triggered_ids[1 + number] != pair.teacher_ids[1 + clean]
        for number, clean in enumerate(pair.token_alignment)
    ]


def _states(pipeline: Any, pairs: Sequence[PromptPair], first: int | None) -> Tensor:
    """Hidden states [N,L,D] of the triggered prompts; with a number, control words from WORDS[first] on replace the trigger.

    The words replace token by token, because a shift of the other tokens alone would change their states.
    """
    words = [*WORDS[first:], *WORDS[:first]]
    control = content_ids(pipeline.tokenizer, " ".join(words))
    ids = torch.tensor([pair.triggered_ids for pair in pairs])
    if first is not None:
        for prompt_ids, pair in zip(ids, pairs, strict=True):
            places = [1 + number for number, of_trigger in enumerate(_trigger_tokens(pair)) if of_trigger]
            prompt_ids[places] = torch.tensor([control[i % len(control)] for i in range(len(places))])
    return pipeline.text_encoder(ids.to(pipeline.device)).last_hidden_state.float()
