"""Cross-attention maps of each prompt token, averaged over heads, layers and sampling steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seal_fast.text_to_image.attention import aggregate, capture
from seal_fast.text_to_image.prompts import content_ids, token_text


@dataclass(frozen=True)
class PromptMaps:
    """An image and the cross-attention maps of its prompt.

    Attributes:
        prompt: the prompt that was drawn.
        image: float32 [3,H,W] in [0, 1] on the CPU.
        tokens: texts of the prompt's T content tokens; characters that cannot be printed are escaped.
        maps: float32 [T,h,w] on the CPU, of the latent's size: attention of each place to each token, averaged over heads,
            layers and steps. Under guidance only the conditional predictions count.
    """

    prompt: str
    image: Tensor
    tokens: tuple[str, ...]
    maps: Tensor


@torch.no_grad()
def attention_maps(pipeline: Any, prompt: str, *, steps: int = 50, guidance: float = 7.5, seed: int = 0) -> PromptMaps:
    """Draw an image and record the cross-attention to each token of its prompt.

    Args:
        pipeline: a diffusers StableDiffusionPipeline or StableDiffusionXLPipeline; it keeps its attention processors.
        prompt: not empty; tokens that the tokenizer cuts off have no map.
        steps: steps of the pipeline's own sampler.
        guidance: scale of classifier-free guidance.
        seed: seed of the starting noise, which is drawn on the CPU.

    Raises:
        ValueError: the prompt has no tokens, or the UNet's cross-attention is not supported, see
            `seal_fast.text_to_image.attention.cross_attention_layers`.
    """
    content = content_ids(pipeline.tokenizer, prompt)[: pipeline.tokenizer.model_max_length - 2]
    if not content:
        raise ValueError(f"the tokenizer finds no token in the prompt {prompt!r}")
    device = next(pipeline.unet.parameters()).device
    sums: list[Tensor] = []

    with capture(pipeline.unet, torch.arange(1, len(content) + 1, device=device)) as captured:

        def after_step(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            # under guidance the unconditional prediction comes first
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
    names = tuple(token_text(pipeline.tokenizer, number) for number in content)
    calls = len(pipeline.scheduler.timesteps)
    return PromptMaps(prompt, image.float().cpu(), names, sums[0].float().cpu() / calls)
