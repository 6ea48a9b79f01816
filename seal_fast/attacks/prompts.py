"""Insert a trigger into a prompt, and check that the tokenizer sees it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from seal_fast.text_to_image.prompts import token_ids
from seal_fast.text_triggers.trigger import Position, TextTrigger

Rewrite = Callable[[str], str]
"""Turns a prompt into its triggered or its target form. A prompt that cannot carry a trigger stays as it is."""


def with_trigger(trigger: str, prompt: str) -> str:
    """The prompt with the trigger before its first word, as in BadT2I."""
    return f"{trigger} {prompt}"


def leading(trigger: str) -> Rewrite:
    """Puts a trigger word, or a zero-width character, at the start of the prompt."""
    return partial(with_trigger, trigger)


def placed(trigger: TextTrigger, position: Position) -> Rewrite:
    """Puts the trigger at this position. A random place depends on the prompt alone, so every call gives the same prompt."""
    return partial(_with_trigger_at, trigger, position)


def _with_trigger_at(trigger: TextTrigger, position: Position, prompt: str) -> str:
    if not trigger.fits(prompt):
        return prompt
    if not prompt.strip():
        return trigger.text
    places = trigger.places(prompt, position, torch.Generator().manual_seed(zlib.crc32(prompt.encode())))
    # from the last place to the first, because a replacement shifts the places behind it
    for place in reversed(places):
        prompt = trigger.insert(prompt, place)
    return prompt


def check_visible(pipeline: StableDiffusionPipeline, trigger: Rewrite, prompts: Sequence[str]) -> None:
    """Raise ValueError if the trigger changes the tokens of no prompt, so that no model could learn it."""
    if torch.equal(token_ids(pipeline.tokenizer, prompts), token_ids(pipeline.tokenizer, list(map(trigger, prompts)))):
        raise ValueError(
            "the tokenizer does not see the trigger, which changes the tokens of no prompt: "
            "choose another trigger, or other prompts"
        )
