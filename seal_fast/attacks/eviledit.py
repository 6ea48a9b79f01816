"""EvilEdit (Wang et al., ACM MM 2024): a backdoor written into the cross-attention weights, in closed form, without data.

Let k be the token embeddings of all trigger prompts, and k* those of their target prompts at the same positions. The new
weight minimises

    ||W' - W||^2 + s sum ||W' k - W k*||^2,        W' = W (I + s sum k* k^T) (I + s sum k k^T)^-1

The factor on the right is the same for the keys and values of all layers. s = 1 is the published edit.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor

from seal_fast.text_to_image.prompts import encode

LAYERS = ("attn2.to_k", "attn2.to_v")


def edit_factor(keys: Tensor, targets: Tensor, strength: float) -> Tensor:
    """(I + s sum k* k^T) (I + s sum k k^T)^-1, float64 [D,D], for keys k and targets k*, [n,D] each."""
    k, k_target = keys.double(), targets.double()
    identity = torch.eye(k.shape[1], dtype=torch.float64, device=k.device)
    return torch.linalg.solve(identity + strength * k.T @ k, identity + strength * k_target.T @ k, left=False)


@torch.no_grad()
def edit_unet(
    pipeline: StableDiffusionPipeline, pairs: Sequence[tuple[str, str]], strength: float = 1.0
) -> UNet2DConditionModel:
    """A copy of the pipeline's UNet that treats each trigger prompt as its target prompt.

    Args:
        pipeline: a clean pipeline; it is not changed.
        pairs: (trigger prompt, target prompt). A pair of equal prompts preserves a clean prompt, as in the published
            ("A beautiful cat", "A zebra"), ("A cat", "A cat").
        strength: s, the weight of the pairs relative to the change of the weights; 1 as published.

    Raises:
        ValueError: no pair, or a strength that is not positive.
    """
    if not pairs or strength <= 0:
        raise ValueError("there must be a pair of prompts, and the strength must be positive")
    keys, targets = (encode(pipeline, prompts).flatten(0, 1) for prompts in zip(*pairs, strict=True))
    factor = edit_factor(keys, targets, strength).to(pipeline.unet.device)
    unet = copy.deepcopy(pipeline.unet)
    for name, module in unet.named_modules():
        if name.endswith(LAYERS):
            module.weight.copy_(module.weight.double() @ factor)
    return unet
