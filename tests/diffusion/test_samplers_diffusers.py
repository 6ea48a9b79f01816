"""Samplers compared with diffusers' schedulers, on a random UNet2DModel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, UNet2DModel
from torch import Tensor

from seal_fast.diffusion import VP, Denoiser, sample

PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    ).double()


@pytest.fixture
def start() -> Tensor:
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


def run(unet: UNet2DModel, scheduler: Any, x: Tensor, **step: Any) -> Tensor:
    """Sample with diffusers' scheduler, as a diffusers pipeline does."""
    # the same table, but diffusers' own arithmetic on it in float64
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    x = x * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = unet(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(output, t, x, return_dict=False, **step)[0]
    return x


def ours(unet: UNet2DModel, scheduler: Any, start: Tensor, sampler: str, **options: Any) -> Tensor:
    denoiser = Denoiser(unet, VP.from_scheduler_config(scheduler.config), (3, 8, 8))
    timesteps = list(dict.fromkeys(int(t) for t in scheduler.timesteps))
    return sample(denoiser, start, sampler, timesteps, **options)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip", [False, True])
def test_ddim(unet: UNet2DModel, start: Tensor, prediction_type: str, clip: bool) -> None:
    scheduler = DDIMScheduler(clip_sample=clip, prediction_type=prediction_type)
    scheduler.set_timesteps(7)
    expected = run(unet, scheduler, start, eta=0.0, use_clipped_model_output=clip)
    torch.testing.assert_close(ours(unet, scheduler, start, "ddim", clip=clip), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("train_steps", "steps"), [(20, 20), (1000, 8)], ids=["full", "strided"])
@pytest.mark.parametrize("clip", [False, True])
def test_ddpm(unet: UNet2DModel, start: Tensor, train_steps: int, steps: int, clip: bool) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=train_steps, clip_sample=clip, variance_type="fixed_small")
    scheduler.set_timesteps(steps)
    expected = run(unet, scheduler, start, generator=torch.Generator().manual_seed(3))
    got = ours(unet, scheduler, start, "ddpm", clip=clip, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("steps", [1, 2, 9, 20])
def test_dpm_solver_pp(unet: UNet2DModel, start: Tensor, prediction_type: str, steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(prediction_type=prediction_type)
    scheduler.set_timesteps(steps)
    expected = run(unet, scheduler, start)
    # diffusers steps in float32
    torch.testing.assert_close(ours(unet, scheduler, start, "dpm-solver++"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_heun(unet: UNet2DModel, start: Tensor, clip: bool, prediction_type: str) -> None:
    scheduler = HeunDiscreteScheduler(clip_sample=clip, prediction_type=prediction_type, beta_start=1e-4, beta_end=0.02)
    scheduler.set_timesteps(timesteps=[950, 700, 401, 120, 3])
    sigma = scheduler.sigmas[0].double()
    expected = run(unet, scheduler, start * (sigma**2 + 1) ** 0.5 / scheduler.init_noise_sigma)
    torch.testing.assert_close(ours(unet, scheduler, start, "heun", clip=clip), expected, rtol=1e-5, atol=1e-5)


def test_zero_terminal_snr(unet: UNet2DModel, start: Tensor) -> None:
    """From below the timestep without signal the rescaled schedule samples as in diffusers; that timestep is refused."""
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample=False)
    scheduler.set_timesteps(6)
    expected = run(unet, scheduler, start, eta=0.0)
    torch.testing.assert_close(ours(unet, scheduler, start, "ddim"), expected, rtol=1e-9, atol=1e-9)

    denoiser = Denoiser(unet, VP.from_scheduler_config(scheduler.config), (3, 8, 8))
    for sampler in ("ddim", "ddpm", "dpm-solver++", "heun"):
        assert sample(denoiser, start, sampler, 3).isfinite().all()
        with pytest.raises(ValueError, match="start at 998"):
            sample(denoiser, start, sampler, [999, 500, 0])
