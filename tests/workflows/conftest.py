"""Tiny real checkpoints for the tests of scan and the command line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from seal_fast.checkpoints import load_denoiser
from seal_fast.diffusion import ModelFamily
from seal_fast.noise_triggers import Calibration, CalibrationModel, Evidence, TerdSettings, model_evidence, reverse_trigger

SETTINGS = TerdSettings(estimation_iterations=2, refinement_iterations=1, batch=2, sampler_steps=2)


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    """write_model(folder, seed=0, gain=1.0): a pipeline with random weights.

    `gain` scales the network's output, and with it how far a reversion moves from its start.
    """

    def write(folder: Path, seed: int = 0, gain: float = 1.0) -> Path:
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=8,
            block_out_channels=(32,),
            layers_per_block=1,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=8,
        )
        with torch.no_grad():
            unet.conv_out.weight *= gain
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def quiet_model(write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model like those the calibration was made on."""
    return write_model(tmp_path_factory.mktemp("quiet") / "model")


@pytest.fixture(scope="session")
def loud_model(write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose reversion runs far off: the calibration must call it backdoored."""
    return write_model(tmp_path_factory.mktemp("loud") / "model", seed=1, gain=30.0)


@pytest.fixture(scope="session")
def diverging_model(write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose reversion leaves the floating-point range."""
    return write_model(tmp_path_factory.mktemp("diverging") / "model", seed=2, gain=1e30)


@pytest.fixture(scope="session")
def quiet_evidence(quiet_model: Path) -> Evidence:
    return model_evidence(reverse_trigger(load_denoiser(quiet_model).denoiser, SETTINGS, seed=0))


@pytest.fixture(scope="session")
def calibration(quiet_evidence: Evidence) -> Calibration:
    """A benign pool a fifth wide around the measured quiet model."""
    models = []
    for factor in (0.8, 0.9, 1.0, 1.1, 1.2):
        scaled = replace(quiet_evidence, M_r=quiet_evidence.M_r * factor, V_r=quiet_evidence.V_r * factor)
        models.append(CalibrationModel(f"benign-{factor}", "0" * 64, ModelFamily("VP", "epsilon"), (3, 8, 8), False, scaled))
    return Calibration(SETTINGS, tuple(models))


@pytest.fixture(scope="session")
def calibration_file(calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "pool.json"
    calibration.save(path)
    return path


@pytest.fixture(scope="session")
def corrupt() -> Callable[[Path], Path]:
    """Writes a safetensors file whose header is noise."""

    def write(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(range(256)))
        return path

    return write


@pytest.fixture
def hub(tmp_path: Path, quiet_model: Path, loud_model: Path, diverging_model: Path, corrupt: Callable[[Path], Path]) -> Path:
    """A folder with a model of every verdict; the one of an error is called b-broken.safetensors."""
    for name, model in {"a-quiet": quiet_model, "c-loud": loud_model, "d-diverging": diverging_model}.items():
        shutil.copytree(model, tmp_path / "hub" / name)
    corrupt(tmp_path / "hub" / "b-broken.safetensors")
    return tmp_path / "hub"
