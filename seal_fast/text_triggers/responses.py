"""How far a changed prompt moves the noise that a UNet predicts: the measure that candidates are ranked by.

Sampling paths of clean prompts are drawn once. On their states x_t the noise predicted for the clean prompt is computed once. A
candidate c costs one evaluation per prompt and timestep:

    d(c, p, t) = e(x_t, t, E(p with c)) - e(x_t, t, E(p))

Its squared norm is divided by that of e(x_t, t, E(p)) - e(x_t, t, E("")), which is what the whole prompt changes. So a response
of 1 is as strong as a prompt. At the middle of the path the zoo's harmless strings have a median near 0.1, and its triggers
reach 0.6 to 50.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from seal_fast.acceleration.graph_cache import GraphCache
from seal_fast.diffusion.samplers import NoiseLevel, noise_levels, timestep_grid
from seal_fast.text_to_image.generation import OnPass, batch_size, starting_noise
from seal_fast.text_to_image.latents import GuidedNoise, noise_schedule, predict
from seal_fast.text_to_image.precision import Precision, autocast
from seal_fast.text_to_image.prompts import encode
from seal_fast.training import quiet


@dataclass(frozen=True)
class ResponseProbe:
    """Clean sampling paths of a few prompts.

    Attributes:
        pipeline: the model that is examined.
        prompts: P clean prompts.
        shares: T timesteps as shares of the process's, descending.
        timesteps: T timesteps, the sampler's nearest ones.
        states: float32 [T,P,C,h,w], states of the paths.
        clean: float32 [T,P,C,h,w], the UNet's output on them for the clean prompts.
        prompt_energy: float32 [T,P], squared norm of the difference between that and the output for the empty prompt.
        precision: precision of the networks.
        on_pass: called after every pass of the UNet with its number of evaluations, of one latent each.
        graphs: records the passes of the sweeps, which are of one shape each; None on a CPU.
    """

    pipeline: Any
    prompts: tuple[str, ...]
    shares: tuple[float, ...]
    timesteps: tuple[int, ...]
    states: Tensor
    clean: Tensor
    prompt_energy: Tensor
    precision: Precision
    on_pass: OnPass = quiet
    graphs: GraphCache | None = None

    @classmethod
    @torch.no_grad()
    def drawn(
        cls,
        pipeline: Any,
        prompts: Sequence[str],
        shares: Sequence[float],
        *,
        steps: int,
        guidance: float,
        precision: Precision,
        seed: int,
        one_noise: bool = False,
        on_pass: OnPass = quiet,
    ) -> Self:
        """Draw the paths by DDIM under guidance, as far as the last timestep that is asked for.

        Args:
            pipeline: a diffusers StableDiffusionPipeline.
            prompts: clean prompts.
            shares: see `ResponseProbe`; of few steps, several may be one timestep.
            steps: steps of the sampler.
            guidance: guidance scale.
            precision: precision of the networks.
            seed: seed of the starting noise.
            one_noise: whether all paths start from the same noise, so that a path does not depend on the other prompts.
            on_pass: see `ResponseProbe`.
        """
        process = noise_schedule(pipeline)
        grid = timestep_grid(process, steps)
        shares = sorted(shares, reverse=True)
        timesteps = [_nearest(grid, share * process.num_timesteps) for share in shares]
        x = starting_noise(pipeline, 1 if one_noise else len(prompts), seed).to(pipeline.device)
        x = x.expand(len(prompts), -1, -1, -1)
        states, clean, prompt_energy = [], [], []
        with autocast(pipeline.device, precision):
            texts, empty = encode(pipeline, prompts), encode(pipeline, [""])
            noise = GuidedNoise(pipeline.unet, process, texts, empty, guidance)
            for here, there in zip(noise_levels(process, grid), noise_levels(process, grid)[1:], strict=False):
                t = torch.full((len(x),), here.t, device=x.device)
                if repeats := timesteps.count(here.t):
                    conditional = predict(pipeline.unet, x, t, texts)
                    unconditional = predict(pipeline.unet, x, t, empty.expand_as(texts))
                    states += [x] * repeats
                    clean += [conditional] * repeats
                    prompt_energy += [(conditional - unconditional).flatten(1).square().sum(dim=1)] * repeats
                    on_pass(2 * len(x))
                if len(states) == len(timesteps):
                    break
                x = _ddim(x, noise(x, t), here, there)
                on_pass(2 * len(x))
        tensors = (torch.stack(states), torch.stack(clean), torch.stack(prompt_energy))
        graphs = GraphCache() if pipeline.device.type == "cuda" else None
        return cls(pipeline, tuple(prompts), tuple(shares), tuple(timesteps), *tensors, precision, on_pass, graphs)

    @torch.no_grad()
    def respond(self, texts: Sequence[Sequence[str]], prompts: Sequence[Sequence[int]], times: Sequence[int]) -> Tensor:
        """The responses to changed prompts, float32 [C,P,T] on the CPU, relative to `prompt_energy`.

        Args:
            texts: for each of C candidates, P changed prompts.
            prompts: for each of them, the index in `prompts` of the prompt that it was made from.
            times: indices into `timesteps` to measure at.
        """
        rows = len(texts[0]) * len(times)
        part = max(1, batch_size(self.pipeline) // rows)
        found = []
        for first in range(0, len(texts), part):
            some = texts[first : first + part]
            places = torch.tensor(prompts[first : first + part])
            d = self._outputs([text for one in some for text in one], places, times) - self.clean[list(times)][:, places]
            relative = d.flatten(3).square().sum(-1) / self.prompt_energy[list(times)][:, places]
            found.append(relative.permute(1, 2, 0).cpu())
            self.on_pass(len(some) * rows)
        return torch.cat(found)

    @torch.no_grad()
    def outputs(self, texts: Sequence[str], places: Sequence[int]) -> Tensor:
        """The UNet's output for N prompts on the states of the paths at `places`, float32 [T,N,values], at all timesteps."""
        part, count = max(1, batch_size(self.pipeline) // len(self.timesteps)), len(self.timesteps)
        found = []
        for first in range(0, len(texts), part):
            some = torch.tensor(places[first : first + part])
            found.append(self._outputs(list(texts[first : first + part]), some, range(count)).flatten(2))
            self.on_pass(count * len(some))
        return torch.cat(found, dim=1)

    def _outputs(self, texts: list[str], places: Tensor, times: Sequence[int]) -> Tensor:
        """The UNet's output [T,*places,C,h,w] for prompts at `places`."""
        x = self.states[list(times)][:, places]
        t = torch.tensor([self.timesteps[index] for index in times], device=x.device).repeat_interleave(places.numel())
        with autocast(self.pipeline.device, self.precision):
            states = encode(self.pipeline, texts).repeat(len(times), 1, 1)
        inputs = x.flatten(0, -4), t, states
        (output,) = self._noise(*inputs) if self.graphs is None else self.graphs("noise", self._noise, *inputs)
        return output.view_as(x)

    def _noise(self, x: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor]:
        """The UNet's output. The autocast is in here, so that a recording holds its casts of the weights."""
        with autocast(self.pipeline.device, self.precision):
            return (predict(self.pipeline.unet, x, t, text),)


def _nearest(timesteps: Sequence[int], wanted: float) -> int:
    return min(timesteps, key=lambda t: abs(t - wanted))


def _ddim(x: Tensor, noise: Tensor, here: NoiseLevel, there: NoiseLevel) -> Tensor:
    """One deterministic DDIM step."""
    return there.a * (x - here.b * noise) / here.a + there.b * noise
