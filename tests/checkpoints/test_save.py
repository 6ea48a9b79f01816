"""Saved checkpoints, loaded by stock diffusers and by our loader."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from torch import Tensor, nn

from seal_fast.checkpoints import CheckpointError, load_denoiser
from seal_fast.checkpoints.save import check_target, save_network, whole_folder


def small_unet(size: int | tuple[int, int] = 8) -> UNet2DModel:
    return UNet2DModel(
        sample_size=size,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )


@pytest.fixture
def x(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=generator)


def changed(source: Path, out: Path) -> nn.Module:
    """The network of `source` with other weights, saved to `out`."""
    network = load_denoiser(source).denoiser.network
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.7)
    out.mkdir()
    save_network(network, source, out)
    return network


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_pipeline_stays_a_pipeline_of_stock_diffusers(tmp_path: Path, x: Tensor, safe: bool) -> None:
    scheduler = DDIMScheduler(num_train_timesteps=37, beta_schedule="squaredcos_cap_v2")
    DDPMPipeline(small_unet(), scheduler).save_pretrained(tmp_path / "source", safe_serialization=safe)
    network = changed(tmp_path / "source", tmp_path / "saved")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(pipeline.unet(x, 5).sample, network(x, 5).sample, rtol=1e-3, atol=1e-6)
    assert pipeline.scheduler.config.num_train_timesteps == 37
    loaded = load_denoiser(tmp_path / "saved")
    assert loaded.format == "diffusers-pipeline"
    torch.testing.assert_close(loaded.denoiser.process.signal, load_denoiser(tmp_path / "source").denoiser.process.signal)


def test_a_pipeline_with_its_parts_side_by_side_stays_one(tmp_path: Path, x: Tensor) -> None:
    source = tmp_path / "source"
    DDPMPipeline(small_unet(), DDIMScheduler(num_train_timesteps=37)).save_pretrained(source)
    for part in ("unet", "scheduler"):
        for file in (source / part).iterdir():
            file.rename(source / file.name)
        (source / part).rmdir()
    network = changed(source, tmp_path / "saved")
    assert not (tmp_path / "saved" / "unet").exists()
    loaded = load_denoiser(tmp_path / "saved").denoiser
    torch.testing.assert_close(loaded.network(x, 5).sample, network(x, 5).sample, rtol=1e-3, atol=1e-6)
    assert loaded.process.num_timesteps == 37


@pytest.mark.parametrize("size", [8, (8, 12)])
def test_a_unet_folder_stays_one(tmp_path: Path, size: int | tuple[int, int], generator: torch.Generator) -> None:
    small_unet(size).half().save_pretrained(tmp_path / "source")
    network = changed(tmp_path / "source", tmp_path / "saved")
    x = torch.randn(1, 3, 8, 8 if size == 8 else 12, generator=generator)
    unet = UNet2DModel.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(unet(x, 3).sample, network(x, 3).sample, rtol=1e-3, atol=1e-6)
    assert load_denoiser(tmp_path / "saved").denoiser.shape == tuple(x.shape[1:])


def test_a_single_file_becomes_a_unet_folder(tmp_path: Path, generator: torch.Generator) -> None:
    types = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=None,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
        norm_eps=1e-6,
        **types,
    )
    torch.save(unet.state_dict(), tmp_path / "unet.bin")
    network = changed(tmp_path / "unet.bin", tmp_path / "saved")
    x = torch.randn(1, 3, 32, 32, generator=generator)
    stock = UNet2DModel.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(stock(x, 3).sample, network(x, 3).sample, rtol=1e-3, atol=1e-6)


def pipeline_with(tmp_path: Path, part: str, files: dict[str, bytes]) -> Path:
    source = tmp_path / "source"
    DDPMPipeline(small_unet(), DDIMScheduler()).save_pretrained(source)
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps({**index, part: ["diffusers", "VQModel"]}))
    for name, content in files.items():
        (source / part).mkdir(exist_ok=True)
        (source / part / name).write_bytes(content)
    return source


def test_other_parts_are_copied_without_the_code_beside_them(tmp_path: Path) -> None:
    files = {"config.json": b'{"a": 1}', "diffusion_pytorch_model.safetensors": b"any bytes", "hook.py": b"raise SystemExit"}
    source = pipeline_with(tmp_path, "decoder", files)
    changed(source, tmp_path / "saved")
    copied = {path.name: path.read_bytes() for path in (tmp_path / "saved" / "decoder").iterdir()}
    assert copied == {name: content for name, content in files.items() if name != "hook.py"}


@pytest.mark.parametrize("trouble", ["pickle", "absent", "link", "outside"])
def test_a_part_that_cannot_be_copied_is_refused(tmp_path: Path, trouble: str) -> None:
    if trouble == "outside":
        source = pipeline_with(tmp_path, "../elsewhere", {})
    else:
        source = pipeline_with(tmp_path, "decoder", {"model.bin": b"x"} if trouble == "pickle" else {})
    if trouble == "link":
        (source / "decoder").mkdir()
        (tmp_path / "secret.json").write_text("{}")
        os.symlink(tmp_path / "secret.json", source / "decoder" / "config.json")
    with pytest.raises(CheckpointError):
        changed(source, tmp_path / "saved")


def test_another_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="UNet2DModel"):
        save_network(nn.Linear(2, 2), tmp_path, tmp_path)


def test_output_folders_that_would_change_files_are_refused(tmp_path: Path) -> None:
    source, full, file = tmp_path / "model", tmp_path / "full", tmp_path / "file"
    source.mkdir()
    full.mkdir()
    (full / "thesis.txt").write_text("")
    file.write_text("")
    (tmp_path / "link").symlink_to(source)
    for out in (full, file, source / "saved", tmp_path / "link" / "saved", full / ".." / "model"):
        with pytest.raises(CheckpointError):
            check_target(out, source)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", source)
    check_target(tmp_path / "new" / "deep", source)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"

    def half() -> None:
        with whole_folder(out) as folder:
            (folder / "half").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert list(out.parent.iterdir()) == []
    out.mkdir()
    with whole_folder(out) as folder:
        (folder / "all").write_text("")
        assert list(out.iterdir()) == []
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["all"]
