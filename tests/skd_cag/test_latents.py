"""States that the student is trained in."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler

from seal_fast.diffusion import VP
from seal_fast.skd_cag.latents import noised


def test_pure_noise_at_the_last_timestep_and_the_forward_process_before(generator: torch.Generator) -> None:
    latents, noise = (torch.randn(5, 3, 7, 6, generator=generator) for _ in range(2))
    t = torch.tensor([999, 0, 998, 999, 500])
    states = noised(VP.from_scheduler_config(DDPMScheduler(beta_schedule="scaled_linear").config), latents, noise, t)
    ab = DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod.double()[t].reshape(-1, 1, 1, 1)
    expected = ab.sqrt() * latents + (1 - ab).sqrt() * noise
    expected[[0, 3]] = noise[[0, 3]].double()
    torch.testing.assert_close(states.double(), expected, rtol=1e-5, atol=1e-5)
