"""Noise processes against diffusers' schedulers and against each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EDMEulerScheduler, PNDMScheduler
from torch import Tensor, nn

from seal_fast.diffusion import EDM, VE, VP, Denoiser, NoiseProcess
from seal_fast.diffusion.process import per_sample


class FromNoise(nn.Module):
    """Predicts a fixed smooth function as noise, in the prediction type of its VP process."""

    def __init__(self, process: VP) -> None:
        super().__init__()
        self.process = process

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a, b = per_sample(self.process.a(t), x), per_sample(self.process.b(t), x)
        eps = torch.tanh(2 * x + b)
        x0 = (x - b * eps) / a
        return {"epsilon": eps, "v_prediction": a * eps - b * x0, "sample": x0}[self.process.prediction_type]


SCHEDULERS = [
    DDPMScheduler(),
    DDPMScheduler(beta_schedule="sigmoid", num_train_timesteps=300),
    DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample"),
    DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, num_train_timesteps=77),
    DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=50),
    DPMSolverMultistepScheduler(trained_betas=[0.01, 0.1, 0.2, 0.4], num_train_timesteps=4),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: f"{type(s).__name__}-{s.config.beta_schedule}")
def test_vp_reads_scheduler_configs(scheduler: Any) -> None:
    process = VP.from_scheduler_config(scheduler.config)
    assert process.num_timesteps == len(scheduler.alphas_cumprod)
    torch.testing.assert_close(process.signal**2, scheduler.alphas_cumprod.double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(process.signal**2 + process.noise**2, torch.ones_like(process.signal), rtol=0, atol=1e-12)
    assert process.prediction_type == scheduler.config.prediction_type


def test_add_noise_agrees_with_diffusers() -> None:
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=60)
    x0, eps = torch.randn(2, 7, 1, 5, 3, dtype=torch.float64)
    t = torch.randint(60, (7,))
    noised = VP.from_scheduler_config(scheduler.config).add_noise(x0, eps, t)
    torch.testing.assert_close(noised, scheduler.add_noise(x0, eps, t), rtol=0, atol=1e-6)


def test_every_config_key_that_is_read_exists_in_diffusers() -> None:
    keys: list[str] = []

    class Spy(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            keys.append(key)
            return super().get(key, default)

    VP.from_scheduler_config(Spy())
    assert keys
    assert set(keys) <= set(DDPMScheduler().config)


def test_linear_is_the_ddpm_schedule() -> None:
    torch.testing.assert_close((VP.linear().signal ** 2).float(), DDPMScheduler().alphas_cumprod, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_prediction_types_agree(prediction_type: str) -> None:
    ab = torch.linspace(0.999, 0.05, 40, dtype=torch.float64)
    outputs = []
    for process in (VP(ab), VP(ab, prediction_type)):
        torch.manual_seed(0)
        x, t = torch.randn(6, 2, 3, 5, dtype=torch.float64), torch.randint(40, (6,))
        outputs.append(Denoiser(FromNoise(process), process, (2, 3, 5))(x, t))
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)


def test_edm_conditioning_agrees_with_diffusers() -> None:
    process = EDM.karras(timesteps=30, sigma_data=0.7)
    scheduler = EDMEulerScheduler(sigma_data=0.7)
    t = torch.tensor([0, 7, 29])
    x, output = torch.randn(2, 3, 2, 4, 3, dtype=torch.float64)
    sigma = process.noise[t].reshape(3, 1, 1, 1)

    scaled, condition = process.network_input(x, t)
    torch.testing.assert_close(scaled, scheduler.precondition_inputs(x, sigma), rtol=1e-12, atol=0)
    torch.testing.assert_close(condition, scheduler.precondition_noise(sigma.flatten()), rtol=1e-12, atol=0)
    x0 = scheduler.precondition_outputs(x, output, sigma)
    torch.testing.assert_close(x - sigma * process.to_noise(output, x, t), x0, rtol=1e-10, atol=1e-10)


def test_edm_sigmas_agree_with_diffusers() -> None:
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(40)
    process = EDM.karras(timesteps=40)
    torch.testing.assert_close(process.noise.flip(0).float(), scheduler.sigmas[:-1], rtol=1e-4, atol=0)
    assert process.prior_scale == pytest.approx(80.0)


def test_ve_sigmas_and_score_agree_with_diffusers() -> None:
    scheduler = diffusers.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=380.0)
    scheduler.set_sigmas(2000)
    process = VE.geometric()
    torch.testing.assert_close(process.noise.float(), scheduler.discrete_sigmas, rtol=1e-4, atol=0)
    x0, eps = torch.randn(2, 5, 1, 2, 2, dtype=torch.float64)
    t = torch.tensor([0, 1, 500, 1500, 1999])
    x = process.add_noise(x0, eps, t)
    sigma = process.noise[t].reshape(-1, 1, 1, 1)
    score = (x0 - x) / sigma**2
    torch.testing.assert_close(process.to_noise(score, x, t), eps, rtol=1e-8, atol=1e-8)
    scaled, condition = process.network_input(x.float(), t)
    assert condition.dtype == torch.float32
    torch.testing.assert_close(condition, process.noise[t].float())
    assert torch.equal(scaled, x.float())


@pytest.mark.parametrize(
    "make",
    [
        lambda: VP(torch.tensor([0.5, 0.6])),
        lambda: VP(torch.tensor([1.0, 0.6])),
        lambda: VP(torch.tensor([0.9, -0.1])),
        lambda: VP(torch.tensor([0.9, float("nan")])),
        lambda: VP(torch.tensor([[0.9, 0.5]])),
        lambda: VP(torch.tensor([0.9])),
        lambda: VP(torch.tensor([0.9, 0.5]), "score"),
        lambda: VP(torch.tensor([0.9, 0.0])),
        lambda: VE(torch.tensor([0.0, 1.0])),
        lambda: VE(torch.tensor([2.0, 1.0])),
        lambda: EDM(torch.tensor([1.0])),
    ],
)
def test_impossible_processes_are_refused(make: Callable[[], NoiseProcess]) -> None:
    with pytest.raises(ValueError, match=r"alphas_cumprod|sigmas|prediction_type|terminal SNR"):
        make()
