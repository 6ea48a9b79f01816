"""How far each unusual part of a prompt moves the noise that the UNet predicts.

    log || e(x_t, t, E(p)) - e(x_t, t, E(p without the part)) ||^2

The states x_t lie on the sampling path of the prompt's core, which holds no unusual part. On the triggered prompt's own path
the target is already drawn, and the prediction moves less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seal_fast.text_to_image.generation import OnPass, batch_size
from seal_fast.text_triggers.detection_settings import PromptDetectionSettings
from seal_fast.text_triggers.prompt_parts import Familiar, PromptPart, prompt_parts
from seal_fast.text_triggers.responses import ResponseProbe


@dataclass(frozen=True)
class MeasuredPrompt:
    """The unusual parts of one prompt, and the log energies of their changes, float32 [N,T] on the CPU."""

    parts: tuple[PromptPart, ...]
    logs: Tensor

    @property
    def kinds(self) -> list[str]:
        return [part.kind for part in self.parts]


@dataclass(frozen=True)
class PartProbe:
    """Measures the parts of prompts in one model.

    Attributes:
        pipeline: a diffusers StableDiffusionPipeline.
        settings: settings of the detector.
        seed: seed of the starting noise, one for all prompts.
        on_pass: called after every pass of the UNet with its number of evaluations, of one latent each.
    """

    pipeline: Any
    settings: PromptDetectionSettings
    seed: int
    on_pass: OnPass

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], familiar: Sequence[Familiar]) -> list[MeasuredPrompt]:
        """Measure each prompt's parts, those that its own `familiar` lacks. A prompt without any needs no evaluation.

        Raises:
            ValueError: the UNet predicts noise that is not finite.
        """
        parts = [tuple(prompt_parts(self.pipeline.tokenizer, *one)) for one in zip(prompts, familiar, strict=True)]
        energies = [torch.zeros(len(some), len(self.settings.shares)) for some in parts]
        cores: dict[str, list[int]] = {}
        for index, some in enumerate(parts):
            if some:
                cores.setdefault(familiar[index].core(prompts[index]), []).append(index)
        batch, different = batch_size(self.pipeline), list(cores)
        for first in range(0, len(different), batch):
            paths = self._paths(different[first : first + batch])
            places = {index: place for place, core in enumerate(paths.prompts) for index in cores[core]}
            texts = [[prompts[index], *(part.without for part in parts[index])] for index in places]
            for index, energy in zip(places, _energies(paths, texts, list(places.values())), strict=True):
                energies[index] = energy
        if not all(energy.isfinite().all() for energy in energies):
            raise ValueError("the UNet predicts noise that is not finite, so no prompt can be examined")
        least = torch.finfo(torch.float32).tiny
        return [MeasuredPrompt(some, energy.clamp_min(least).log()) for some, energy in zip(parts, energies, strict=True)]

    def _paths(self, prompts: Sequence[str]) -> ResponseProbe:
        settings = self.settings
        return ResponseProbe.drawn(
            self.pipeline,
            prompts,
            settings.shares,
            steps=settings.sampler_steps,
            guidance=settings.guidance,
            precision=settings.precision,
            seed=self.seed,
            one_noise=True,
            on_pass=self.on_pass,
        )


def _energies(paths: ResponseProbe, texts: Sequence[Sequence[str]], places: Sequence[int]) -> list[Tensor]:
    """For each list of texts, on the path at its place: the energies [n-1,T] of how its later texts differ from its first."""
    rows = [place for place, some in zip(places, texts, strict=True) for _ in some]
    outputs = paths.outputs([text for some in texts for text in some], rows)
    return [(out[:, 1:] - out[:, :1]).square().sum(-1).T.cpu() for out in outputs.split([len(some) for some in texts], dim=1)]
