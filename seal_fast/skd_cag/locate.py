"""Which module of a text-to-image pipeline holds a backdoor: the text encoder or the UNet?

A text encoder that is taught to read a trigger as another prompt (Rickrolling, IBA) moves the hidden states of the prompt's own
words. One that is not lets a rare token move them no more than ordinary words do, and the effect must come from the UNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from seal_fast.skd_cag.pairs import PromptPair, Trigger, prompt_pair

WORDS = ("the", "this", "some", "very", "quite", "now", "here", "just")
"""Harmless words."""
# a clean encoder of 0.1 M parameters that knew a hundred words reached 4.8 with an unknown word of eight tokens
RATIO = 2.5
"""From this many times the shift by the most disturbing harmless words on, the text encoder is said to hold the backdoor."""
PROMPTS = 32


@dataclass(frozen=True)
class Location:
    """Where a backdoor seems to sit.

    Attributes:
        module: "text_encoder" or "unet".
        shift: of the hidden states of the words behind the trigger: mean squared distance from what they are with harmless
            words in its place, relative to their square.
        harmless_shift: that of the most disturbing harmless words from the others.
    """

    module: Literal["unet", "text_encoder"]
    shift: float
    harmless_shift: float


def harmless_words(tokenizer: Any, trigger: Trigger) -> list[str]:
    """Insertions of no fewer tokens than the trigger's: more tokens change more."""
    tokens = _length(tokenizer, trigger) if isinstance(trigger, str) else 1
    return [_words_of(tokenizer, tokens, first) for first in range(len(WORDS))]


def _words_of(tokenizer: Any, tokens: int, first: int) -> str:
    text = WORDS[first]
    while _length(tokenizer, text) < tokens:
        first = (first + 1) % len(WORDS)
        text = f"{text} {WORDS[first]}"
    return text


def _length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def locate(pipeline: Any, triggers: Sequence[Trigger], prompts: Sequence[str]) -> Location:
    """Judge by the trigger that moves the text encoder most, in front of the first PROMPTS prompts that it fits.

    Raises:
        ValueError: a trigger that the tokenizer does not see, or that fits no prompt.
    """
    return max((_locate(pipeline, trigger, prompts) for trigger in triggers), key=lambda at: at.shift / at.harmless_shift)


def fitting(prompts: Sequence[str], trigger: Trigger) -> list[str]:
    """The prompts that a trigger can be put into: all, or those with the text that it replaces."""
    kept = [prompt for prompt in prompts if isinstance(trigger, str) or trigger[0] in prompt]
    if not kept:
        raise ValueError(f"no prompt has the text that the trigger {trigger!r} replaces: give prompts that do")
    return kept


@torch.no_grad()
def _locate(pipeline: Any, trigger: Trigger, prompts: Sequence[str]) -> Location:
    generator = torch.Generator().manual_seed(0)
    pairs = [
        prompt_pair(pipeline.tokenizer, prompt, trigger, "start", generator) for prompt in fitting(prompts, trigger)[:PROMPTS]
    ]
    readings = torch.stack([_states(pipeline, pairs, first) for first in (None, *range(len(WORDS)))])
    after = torch.stack([_behind_trigger(pair) for pair in pairs]).to(readings.device)
    differences = torch.stack([_difference(readings, other, after) for other in readings[1:]])
    shift = float(differences[:, 0].mean())
    harmless = float(differences[:, 1:].sum(dim=0).max()) / (len(WORDS) - 1)
    return Location("text_encoder" if shift > RATIO * harmless else "unet", shift, harmless)


def _changed(pair: PromptPair) -> list[bool]:
    """For every content token of the triggered prompt whether the trigger made it."""
    return [
        partner is None or pair.triggered_ids[1 + place] != pair.teacher_ids[1 + partner]
        for place, partner in enumerate(pair.partners)
    ]


def _behind_trigger(pair: PromptPair) -> Tensor:
    """Which of the L places hold a token of the prompt, or EOS, behind the trigger: those before it cannot see it."""
    changed = _changed(pair)
    places = torch.zeros(len(pair.triggered_ids), dtype=torch.bool)
    places[[1 + place for place in range(changed.index(True), len(changed)) if not changed[place]]] = True
    places[1 + len(changed)] = True
    return places


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


def _difference(readings: Tensor, other: Tensor, places: Tensor) -> Tensor:
    """Mean squared distance of each of the readings [R,N,L,D] from another [N,L,D], relative to its square, [R]."""
    relative = (readings - other).square().sum(dim=-1) / other.square().sum(dim=-1)
    return relative[:, places].mean(dim=1)
