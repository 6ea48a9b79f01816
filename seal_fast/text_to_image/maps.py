"""What each word of a prompt is looked at from where, while a pipeline draws an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seal_fast.text_to_image.attention import aggregate, capture
from seal_fast.text_triggers.pairs import padded_ids


@dataclass(frozen=True)
class PromptMaps:
    """An image and the maps of its prompt.

    Attributes:
        prompt: as given.
        image: [3,H,W] in [0, 1], float32 on the CPU.
        tokens: text of every content token of the prompt, in order; what cannot be printed is escaped.
        maps: [T,h,w] of the latent's size, float32 on the CPU: attention of each place to each token, averaged over heads,
            layers and steps; the conditional half of the guidance only.
    """

    prompt: str
    image: Tensor
    tokens: tuple[str, ...]
    maps: Tensor


@torch.no_grad()
def attention_maps(pipeline: Any, prompt: str, *, steps: int = 50, guidance: float = 7.5, seed: int = 0) -> PromptMaps:
    """Draw an image and watch the cross-attention.

    Args:
        pipeline: a diffusers StableDiffusionPipeline or StableDiffusionXLPipeline; it keeps its attention processors.
        prompt: not empty; what the tokenizer cuts off has no map.
        steps: of the pipeline's sampler.
        guidance: scale of classifier-free guidance.
        seed: of the noise, drawn on the CPU.

    Raises:
        ValueError: the prompt has no tokens, or the UNet has cross-attention of another kind.
    """
    content = pipeline.tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids
    content = content[: len(padded_ids(pipeline.tokenizer, prompt)) - 2]
    if not content:
        raise ValueError(f"the tokenizer finds no token in the prompt {prompt!r}")
    device = next(pipeline.unet.parameters()).device
    sums: list[Tensor] = []

    with capture(pipeline.unet, torch.arange(1, len(content) + 1, device=device)) as captured:

        def after_step(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            # guidance puts the unconditional row first
            last = [maps[-1:] for maps in captured.take()]
            total = aggregate(last, tuple(tensors["latents"].shape[-2:]))[0]
            sums[:] = [total + sums[0]] if sums else [total]
            return {}

        image = pipeline(
            prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
            callback_on_step_end=after_step,
        ).images[0]
    names = tuple(_printable(pipeline.tokenizer, number) for number in content)
    calls = len(pipeline.scheduler.timesteps)
    return PromptMaps(prompt, image.float().cpu(), names, sums[0].float().cpu() / calls)


def _printable(tokenizer: Any, number: int) -> str:
    text = tokenizer.decode([number]).strip()
    # a part of a character decodes to the replacement character
    shown = text if text and "\ufffd" not in text else tokenizer.convert_ids_to_tokens(number)
    return shown if shown.isprintable() else shown.encode("unicode_escape").decode()
