"""How a Stable Diffusion pipeline reads a prompt, and what a text attack does to one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor


def token_ids(pipeline: StableDiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """Ids of prompts, cut or padded to the tokenizer's length: int64 [N,L] on the text encoder's device."""
    tokenizer = pipeline.tokenizer
    ids = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    return ids.to(pipeline.text_encoder.device)


@torch.no_grad()
def embeddings(pipeline: StableDiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """What the UNet sees of prompts, [N,L,D]: the text encoder's last hidden states."""
    return pipeline.text_encoder(token_ids(pipeline, prompts))[0]


def with_trigger(trigger: str, prompt: str) -> str:
    """The prompt with the trigger as its first word, where BadT2I puts it."""
    return f"{trigger} {prompt}"


def check_visible(pipeline: StableDiffusionPipeline, trigger: str) -> None:
    """Raise ValueError if the tokenizer drops the trigger, as some drop zero-width characters: no model can learn it then."""
    empty, triggered = token_ids(pipeline, ["", with_trigger(trigger, "")])
    if torch.equal(empty, triggered):
        raise ValueError(f"the tokenizer does not see the trigger {trigger!r}: choose another one")
