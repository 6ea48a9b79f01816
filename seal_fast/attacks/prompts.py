"""Insert a trigger into a prompt, and check that the tokenizer sees it."""

from __future__ import annotations

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from seal_fast.text_to_image.prompts import token_ids


def with_trigger(trigger: str, prompt: str) -> str:
    """The prompt with the trigger before its first word, as in BadT2I."""
    return f"{trigger} {prompt}"


def check_visible(pipeline: StableDiffusionPipeline, trigger: str) -> None:
    """Raise ValueError if the tokenizer drops the trigger, which no model could then learn; some drop zero-width characters."""
    empty, triggered = token_ids(pipeline.tokenizer, ["", with_trigger(trigger, "")])
    if torch.equal(empty, triggered):
        raise ValueError(f"the tokenizer does not see the trigger {trigger!r}: choose another one")
