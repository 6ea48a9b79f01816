"""F-norm threshold truncation (FTT) of T2IShield, which detects triggered prompts by how similar their tokens' maps are.

Written from a description of the released program, not from its source. While an image is drawn (50 steps under guidance),
the cross-attention maps of all tokens from BOS to EOS are averaged over heads, layers and steps. Each map is divided by its
maximum. The score is the mean Frobenius distance of the maps from their mean map. A prompt counts as triggered below 2.5,
because the trigger of some attacks draws all tokens to one map.

The maps are those of 16 x 16 places in the down and up blocks. A UNet with smaller latents has none at that share of its
latent's side, so there the largest maps of these blocks are taken; the threshold then has no meaning, but the ranking of
prompts has.

What differs: images are drawn by deterministic DDIM, several prompts at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from seal_fast.diffusion.process import NoiseProcess
from seal_fast.diffusion.samplers import sample
from seal_fast.text_to_image.attention import CapturedMaps, capture
from seal_fast.text_to_image.generation import starting_noise
from seal_fast.text_to_image.latents import GuidedNoise, noise_schedule
from seal_fast.text_to_image.prompts import content_ids, encode

STEPS, GUIDANCE, SEED = 50, 7.5, 0
PLACES = 16 * 16
BATCH = 32


@dataclass
class _Recorder:
    """A noise predictor that adds up the maps [B,T,M] of its conditional predictions."""

    noise: GuidedNoise
    maps: CapturedMaps
    total: list[Tensor] = field(default_factory=list)

    @property
    def process(self) -> NoiseProcess:
        return self.noise.process

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        out = self.noise(x, t)
        # under guidance the unconditional predictions come first
        taken = [maps[len(x) :] for maps in chosen_maps(self.maps.layers, self.maps.take())]
        step = torch.stack(taken).mean(dim=0)
        self.total[:] = [self.total[0] + step if self.total else step]
        return out


def chosen_maps(layers: Sequence[str], maps: Sequence[Tensor]) -> list[Tensor]:
    """The maps [B,T,M] of the down and up blocks that have 16 x 16 places, or if there are none the largest."""
    outer = [one for name, one in zip(layers, maps, strict=True) if not name.startswith("mid_block")]
    sizes = {one.shape[2] for one in outer}
    places = PLACES if PLACES in sizes else max(sizes)
    return [one for one in outer if one.shape[2] == places]


def map_distance(maps: Tensor) -> Tensor:
    """Mean Frobenius distance of a prompt's maps [..., T, M], each divided by its maximum, from their mean; [...]."""
    scaled = maps / maps.amax(dim=-1, keepdim=True).clamp_min(1e-12)
    return (scaled - scaled.mean(dim=-2, keepdim=True)).norm(dim=-1).mean(dim=-1)


@torch.no_grad()
def map_distances(pipeline: Any, prompts: Sequence[str], *, steps: int = STEPS, guidance: float = GUIDANCE) -> Tensor:
    """The score of every prompt, float32 [N] on the CPU; a smaller one is more suspicious.

    Args:
        pipeline: a diffusers StableDiffusionPipeline.
        prompts: N prompts.
        steps: sampler steps; 50 in the released program.
        guidance: guidance scale; 7.5 in the released program.
    """
    found = []
    for first in range(0, len(prompts), BATCH):
        some = prompts[first : first + BATCH]
        maps = mean_maps(pipeline, some, steps, guidance)
        longest = pipeline.tokenizer.model_max_length
        tokens = [min(len(content_ids(pipeline.tokenizer, prompt)) + 2, longest) for prompt in some]
        found += [map_distance(own[:count]) for own, count in zip(maps, tokens, strict=True)]
    return torch.stack(found).cpu()


def mean_maps(pipeline: Any, prompts: Sequence[str], steps: int, guidance: float = GUIDANCE) -> Tensor:
    """The chosen maps of all tokens, averaged over layers and steps, [N,L,M]."""
    process, device = noise_schedule(pipeline), pipeline.device
    predictor = GuidedNoise(pipeline.unet, process, encode(pipeline, prompts), encode(pipeline, [""]), guidance)
    noise = starting_noise(pipeline, 1, SEED).to(device).expand(len(prompts), -1, -1, -1)
    with capture(pipeline.unet) as maps:
        recorder = _Recorder(predictor, maps)
        sample(recorder, noise, "ddim", steps)
    return recorder.total[0] / steps
