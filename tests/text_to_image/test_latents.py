"""States that the student is trained in."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from seal_fast.diffusion import VP
from seal_fast.text_to_image.latents import inverse_snr_weights, noised


def test_pure_noise_at_the_last_timestep_and_the_forward_process_before(generator: torch.Generator) -> None:
    latents, noise = (torch.randn(5, 3, 7, 6, generator=generator) for _ in range(2))
    t = torch.tensor([999, 0, 998, 999, 500])
    states = noised(VP.from_scheduler_config(DDPMScheduler(beta_schedule="scaled_linear").config), latents, noise, t)
    ab = DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod.double()[t].reshape(-1, 1, 1, 1)
    expected = ab.sqrt() * latents + (1 - ab).sqrt() * noise
    expected[[0, 3]] = noise[[0, 3]].double()
    torch.testing.assert_close(states.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_weights_are_what_an_error_of_the_output_becomes_in_the_image(prediction: str, generator: torch.Generator) -> None:
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(1000)
    x, output, error = (torch.randn(1, 3, 5, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    weights = inverse_snr_weights(VP.from_scheduler_config(scheduler.config), 30.0)
    for t in (0, 150, 400, 700, 999):
        one, other = (scheduler.step(out, t, x).pred_original_sample for out in (output, output + error))
        grown = float((one - other).square().sum() / error.square().sum())
        assert float(weights[t]) == pytest.approx(min(max(grown, 1.0), 30.0), rel=1e-3)
    assert weights.shape == (1000,)
