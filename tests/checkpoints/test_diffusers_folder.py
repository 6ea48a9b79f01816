"""Pipelines and UNet folders as diffusers writes them: the loaded network predicts what the saved one does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    LDMPipeline,
    PNDMScheduler,
    ScoreSdeVeScheduler,
    UNet2DModel,
    VQModel,
)
from safetensors.torch import load_file, save_file

from seal_fast.checkpoints import CheckpointError, LoadedCheckpoint, identify, load_denoiser
from seal_fast.checkpoints.text_to_image import UNET
from seal_fast.diffusion import ModelFamily

WEIGHTS = "diffusion_pytorch_model.safetensors"


def same_output(loaded: LoadedCheckpoint, unet: UNet2DModel, tolerance: float = 1e-6) -> None:
    x, t = torch.randn(3, *loaded.denoiser.shape), torch.tensor([0, 411, 999])
    with torch.no_grad():
        torch.testing.assert_close(loaded.denoiser.network(x, t).sample, unet(x, t).sample, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(("pipeline", "scheduler"), [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)])
def test_pipeline_round_trip(tmp_path: Path, new_unet: Callable, pipeline: type, scheduler: type, safe: bool) -> None:
    unet = new_unet()
    pipeline(unet, scheduler(num_train_timesteps=500, beta_end=0.03)).save_pretrained(tmp_path, safe_serialization=safe)
    loaded = load_denoiser(tmp_path)
    assert identify(tmp_path) == loaded.format == "diffusers-pipeline"
    assert loaded.denoiser.shape == (3, 16, 16)
    assert not any(p.requires_grad for p in loaded.denoiser.network.parameters())
    same_output(loaded, unet)
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.03, 500, dtype=torch.float64), 0)
    torch.testing.assert_close(loaded.denoiser.process.signal, alphas.sqrt(), rtol=1e-6, atol=0)
    assert loaded.notes == ()


def test_eps_from_v_and_sample_prediction(tmp_path: Path, new_unet: Callable) -> None:
    unet = new_unet()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([100, 800])
    for prediction_type in ("v_prediction", "sample"):
        DDPMPipeline(unet, DDPMScheduler(prediction_type=prediction_type)).save_pretrained(tmp_path / prediction_type)
        a2 = DDPMScheduler().alphas_cumprod.double()[t].reshape(-1, 1, 1, 1)
        with torch.no_grad():
            output = unet(x, t).sample.double()
            eps = load_denoiser(tmp_path / prediction_type).denoiser(x, t)
        expected = (
            a2.sqrt() * output + (1 - a2).sqrt() * x
            if prediction_type == "v_prediction"
            else (x - a2.sqrt() * output) / (1 - a2).sqrt()
        )
        torch.testing.assert_close(eps.double(), expected, rtol=1e-4, atol=1e-4)


def test_unet_only_folder_assumes_a_schedule_and_says_so(tmp_path: Path, new_unet: Callable) -> None:
    unet = new_unet(sample_size=(16, 32))
    unet.save_pretrained(tmp_path)
    loaded = load_denoiser(tmp_path)
    assert identify(tmp_path) == loaded.format == "diffusers-unet"
    assert loaded.denoiser.shape == (3, 16, 32)
    same_output(loaded, unet)
    assert any("1e-4..0.02" in note for note in loaded.notes)


def test_pipeline_with_its_parts_side_by_side(tmp_path: Path, new_unet: Callable) -> None:
    unet = new_unet()
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=200)).save_pretrained(tmp_path / "nested")
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in ("model_index.json", "unet/config.json", f"unet/{WEIGHTS}", "scheduler/scheduler_config.json"):
        shutil.copy(tmp_path / "nested" / name, flat)
    loaded = load_denoiser(flat)
    assert loaded.denoiser.process.num_timesteps == 200
    same_output(loaded, unet)


def baddiffusion_folder(root: Path, unet: UNet2DModel, args: str) -> Path:
    """A result folder of BadDiffusion: a training config.json beside model_index.json, an earlier epoch, accelerate's state."""
    folder = root / "res_DDPM-CIFAR10-32_CIFAR10_ep50_c1.0_p0.1_BOX_14-HAT"
    for place in (folder, folder / "epochs" / "ep20"):
        DDPMPipeline(unet, DDPMScheduler(clip_sample=False)).save_pretrained(place, safe_serialization=False)
    (folder / "config.json").write_text(json.dumps({"project": "default", "trigger": "BOX_14", "block_out_channels": None}))
    (folder / "args.json").write_text(args)
    (folder / "ckpt").mkdir()
    torch.save({"state": {}, "param_groups": []}, folder / "ckpt" / "optimizer.bin")
    torch.save({"epoch": 50, "step": 1}, folder / "data.ckpt")
    return folder


@pytest.mark.parametrize(
    ("args", "claim"),
    [
        (
            json.dumps({"trigger": "STOP_SIGN_14", "target": "HAT", "ckpt": "/etc/passwd", "gpu": None}),
            "'STOP_SIGN_14' (not verified)",
        ),
        (json.dumps({"trigger": {"a": []}}), None),
        ("[" * 200_000, "not readable"),
        ("{trigger: \x00", "not readable"),
        ('{"trigger": "\\u001b[31m' + "x" * 5000 + '"}', r"'\x1b[31mxxx"),
    ],
)
def test_a_baddiffusion_folder_is_loaded_and_its_claims_are_noted(
    tmp_path: Path, new_unet: Callable, args: str, claim: str | None
) -> None:
    unet = new_unet()
    loaded = load_denoiser(baddiffusion_folder(tmp_path, unet, args))
    assert loaded.format == "diffusers-pipeline"
    same_output(loaded, unet)
    assert loaded.notes == () if claim is None else any(claim in note for note in loaded.notes)
    assert all(len(note) < 200 and note.isprintable() for note in loaded.notes)


def test_a_missing_unet_config_is_inferred(tmp_path: Path, new_unet: Callable) -> None:
    unet = new_unet(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=(32, 64, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    (tmp_path / "unet/config.json").unlink()
    loaded = load_denoiser(tmp_path)
    assert loaded.denoiser.shape == (3, 32, 32)
    same_output(loaded, unet)
    assert any("inferred" in note for note in loaded.notes)
    same_output(load_denoiser(tmp_path / "unet" / WEIGHTS), unet)


def test_no_config_and_no_attention_asks_for_the_config(tmp_path: Path, new_unet: Callable) -> None:
    plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    new_unet(**plain).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"0 levels with attention.*config\.json"):
        load_denoiser(tmp_path)


def test_attention_names_of_old_diffusers_are_read(tmp_path: Path, new_unet: Callable) -> None:
    unet = new_unet()
    unet.save_pretrained(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(tmp_path / WEIGHTS)
    for new, name in old.items():
        tensors = {k.replace(f".{new}.", f".{name}."): v for k, v in tensors.items()}
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    same_output(load_denoiser(tmp_path), unet)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(tmp_path: Path, new_unet: Callable, dtype: torch.dtype) -> None:
    unet = new_unet().to(dtype)
    unet.save_pretrained(tmp_path)
    loaded = load_denoiser(tmp_path)
    assert {p.dtype for p in loaded.denoiser.network.parameters()} == {torch.float32}
    same_output(loaded, unet.float())


def test_shards_are_joined_and_of_two_formats_safetensors_is_read(tmp_path: Path, new_unet: Callable) -> None:
    unet = new_unet()
    unet.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    same_output(load_denoiser(tmp_path), unet)
    other = new_unet()
    other.save_pretrained(tmp_path / "both", safe_serialization=True)
    new_unet().save_pretrained(tmp_path / "bin", safe_serialization=False)
    shutil.copy(tmp_path / "bin/diffusion_pytorch_model.bin", tmp_path / "both")
    loaded = load_denoiser(tmp_path / "both")
    same_output(loaded, other)
    assert any("safetensors used; diffusion_pytorch_model.bin not read" in note for note in loaded.notes)


def test_the_hash_depends_on_the_weights_only(tmp_path: Path, new_unet: Callable) -> None:
    unet = new_unet()
    for name in ("a", "b"):
        unet.save_pretrained(tmp_path / name)
    (tmp_path / "b" / "README.md").write_text("moved")
    new_unet().save_pretrained(tmp_path / "c")
    a, b, c = (load_denoiser(tmp_path / name).sha256 for name in "abc")
    assert a == b != c
    assert len(a) == 64


def test_variance_exploding_models_are_loaded(tmp_path: Path, new_unet: Callable) -> None:
    unet = new_unet(
        time_embedding_type="fourier",
        flip_sin_to_cos=True,
        freq_shift=0,
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        norm_num_groups=None,
        mid_block_scale_factor=2**0.5,
        downsample_padding=1,
    )
    unet.save_pretrained(tmp_path / "unet")
    index = {
        "_class_name": "ScoreSdeVePipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "ScoreSdeVeScheduler"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="scheduler_config"):
        load_denoiser(tmp_path)
    scheduler = ScoreSdeVeScheduler(num_train_timesteps=50, sigma_max=380.0)
    scheduler.save_pretrained(tmp_path / "scheduler")
    denoiser = load_denoiser(tmp_path).denoiser
    scheduler.set_sigmas(50)
    torch.testing.assert_close(denoiser.process.noise, scheduler.discrete_sigmas.double(), rtol=1e-5, atol=0)
    x, t = torch.rand(2, 3, 16, 16), torch.tensor([4, 40])
    sigma = scheduler.discrete_sigmas[t]
    with torch.no_grad():
        expected = -sigma.reshape(-1, 1, 1, 1) * unet(x, sigma).sample
        torch.testing.assert_close(denoiser(x, t), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autoencoder", [AutoencoderKL, VQModel])
def test_latent_diffusion_is_loaded_without_its_decoder(tmp_path: Path, new_unet: Callable, autoencoder: type) -> None:
    unet, decoder = new_unet(), autoencoder(latent_channels=3, block_out_channels=(32,))
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
    LDMPipeline(decoder, unet, DDIMScheduler(clip_sample=False, **noise)).save_pretrained(tmp_path)
    (weights,) = (tmp_path / "vqvae").glob("*.safetensors")
    weights.write_bytes(b"never opened")
    loaded = load_denoiser(tmp_path)
    assert loaded.denoiser.shape == (3, 16, 16)
    assert loaded.denoiser.family == ModelFamily("VP", "epsilon")
    same_output(loaded, unet)
    alphas = torch.cumprod(1 - torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2, 0)
    torch.testing.assert_close(loaded.denoiser.process.signal, alphas.sqrt(), rtol=1e-5, atol=0)
    assert any("images here are latents" in note for note in loaded.notes)


def test_edm_models_are_loaded(tmp_path: Path, new_unet: Callable) -> None:
    unet = new_unet()
    scheduler = EDMEulerScheduler(num_train_timesteps=60, sigma_max=50.0)
    unet.save_pretrained(tmp_path)
    scheduler.save_pretrained(tmp_path)
    denoiser = load_denoiser(tmp_path).denoiser
    scheduler.set_timesteps(60)
    sigmas = scheduler.sigmas[:-1].flip(0)
    torch.testing.assert_close(denoiser.process.noise, sigmas.double(), rtol=1e-4, atol=0)
    x, t = 20 * torch.randn(1, 3, 16, 16), torch.tensor([45])
    sigma = sigmas[45]
    with torch.no_grad():
        output = unet(scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(sigma)).sample
        x0 = scheduler.precondition_outputs(x, output, sigma)
        torch.testing.assert_close(denoiser(x, t), (x - x0) / sigma, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"_class_name": None},
        {"num_train_timesteps": 10**9},
        {"num_train_timesteps": "1000"},
        {"beta_start": float("nan")},
        {"beta_end": 1.5},
        {"beta_schedule": "../x"},
        {"trained_betas": [0.1] * 7},
        {"trained_betas": ["x"] * 1000},
        {"prediction_type": "flow_prediction"},
        {"prediction_type": ["epsilon"]},
        {"use_flow_sigmas": True},
        {"use_flow_sigmas": 0},
        {"rescale_betas_zero_snr": "yes"},
        {"rescale_betas_zero_snr": [1]},
        {"_class_name": "ScoreSdeVeScheduler", "sigma_min": 3, "sigma_max": 2},
        {"_class_name": "ScoreSdeVeScheduler", "sigma_max": float("inf")},
        {"_class_name": "EDMEulerScheduler", "rho": 0},
        {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"},
    ],
)
def test_impossible_schedulers_are_refused(tmp_path: Path, new_unet: Callable, change: dict) -> None:
    DDPMPipeline(new_unet(), PNDMScheduler()).save_pretrained(tmp_path)
    path = tmp_path / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError) as refusal:
        load_denoiser(tmp_path)
    assert refusal.value.path == path


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}, "text-to-image"),
        ({"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}, "conditional"),
        ({"_class_name": "DDPMPipeline", "unet": ["my_unet", "UNet2DModel"]}, "never run"),
        ({"_class_name": "DDPMPipeline"}, "never run"),
        ({"_class_name": ["a"] * 500, "unet": {"a": 1}}, "never run"),
    ],
)
def test_other_pipelines_are_refused_by_name(tmp_path: Path, index: dict, reason: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "my_unet.py").write_text("raise SystemExit('executed')")
    assert identify(tmp_path) == "diffusers-pipeline"
    with pytest.raises(CheckpointError, match=reason) as refusal:
        load_denoiser(tmp_path)
    assert len(str(refusal.value)) < 400


def test_conditional_unets_are_refused_by_name(tmp_path: Path, new_unet: Callable) -> None:
    new_unet(num_class_embeds=10).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="class-conditional"):
        load_denoiser(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    assert identify(tmp_path) == UNET
    with pytest.raises(CheckpointError, match="text-to-image"):
        load_denoiser(tmp_path)
