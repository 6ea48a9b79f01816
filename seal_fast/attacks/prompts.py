"""What a text attack does to a prompt."""

from __future__ import annotations

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from seal_fast.text_to_image.prompts import token_ids


def with_trigger(trigger: str, prompt: str) -> str:
    """The prompt with the trigger as its first word, where BadT2I puts it."""
    return f"{trigger} {prompt}"


def check_visible(pipeline: StableDiffusionPipeline, trigger: str) -> None:
    """Raise ValueError if the tokenizer drops the trigger, as some drop zero-width characters: no model can learn it then."""
    empty, triggered = token_ids(pipeline.tokenizer, ["", with_trigger(trigger, "")])
    if torch.equal(empty, triggered):
        raise ValueError(f"the tokenizer does not see the trigger {trigger!r}: choose another one")
