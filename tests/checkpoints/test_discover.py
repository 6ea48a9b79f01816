from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import save_file

from seal_fast.checkpoints import CheckpointError, discover, identify
from seal_fast.checkpoints.text_to_image import PIPELINE, TEXT_ENCODER, UNET
from seal_fast.checkpoints.trigger import Trigger


def test_each_checkpoint_is_found_once(tmp_path: Path, new_unet: Callable, trojdiff_file: Path) -> None:
    pipeline = DDPMPipeline(new_unet(), DDPMScheduler())
    for place in ("zoo/bad", "zoo/bad/epochs/ep3"):
        pipeline.save_pretrained(tmp_path / place)
    (tmp_path / "zoo/bad/ckpt").mkdir()
    torch.save(torch.load(trojdiff_file, weights_only=True), tmp_path / "zoo/bad/ckpt/ckpt.pth")
    new_unet().save_pretrained(tmp_path / "zoo/unet_epoch_74")
    broken = tmp_path / "a_broken"
    broken.mkdir()
    (broken / "model_index.json").write_text("{")
    (broken / "unet").mkdir()
    logs = tmp_path / "exp/logs/doc"
    logs.mkdir(parents=True)
    trojdiff_file.rename(logs / "ckpt_1000.pth")
    (logs / "torn.ckpt").write_bytes(b"PK\x03\x04 torn")
    for name in ("manifest.json", "README.md", "sample.png", "config.yml"):
        (tmp_path / name).write_text("x")
    torch.save({"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}, tmp_path / "optimizer.bin")
    torch.save({"epoch": 3, "step": 2}, tmp_path / "data.ckpt")
    Trigger.shift(torch.zeros(3, 4, 4)).save(tmp_path / "trigger.safetensors")
    found = ["a_broken", "exp/logs/doc/ckpt_1000.pth", "exp/logs/doc/torn.ckpt", "zoo/bad", "zoo/unet_epoch_74"]
    assert discover(tmp_path) == [tmp_path / name for name in found]
    assert [identify(tmp_path / name) for name in found] == [
        "diffusers-pipeline",
        "trojdiff",
        None,
        "diffusers-pipeline",
        "diffusers-unet",
    ]


def test_the_path_itself_may_be_a_checkpoint(tmp_path: Path, new_unet: Callable, trojdiff_file: Path) -> None:
    new_unet().save_pretrained(tmp_path / "unet")
    assert discover(tmp_path / "unet") == [tmp_path / "unet"]
    assert discover(trojdiff_file) == [trojdiff_file]
    (tmp_path / "empty").mkdir()
    assert discover(tmp_path / "empty") == []
    assert identify(tmp_path / "empty") is None
    with pytest.raises(CheckpointError, match="does not exist"):
        discover(tmp_path / "nowhere")


def test_networks_of_other_architectures_are_listed(tmp_path: Path) -> None:
    save_file({"transformer.block.0.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    assert discover(tmp_path) == [tmp_path / "other.safetensors"]
    assert identify(tmp_path / "other.safetensors") is None


def test_text_to_image_models_are_told_from_unconditional_ones(tmp_path: Path) -> None:
    configs = {
        "pipeline/model_index.json": {"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["x", "y"]},
        "text/config.json": {"model_type": "clip_text_model"},
        "unconditional/model_index.json": {"unet": ["diffusers", "UNet2DModel"], "text_encoder": [None, None]},
        "unet/config.json": {"_class_name": "UNet2DConditionModel"},
    }
    for name, content in configs.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(content))
    found = discover(tmp_path)
    assert [folder.name for folder in found] == ["pipeline", "text", "unconditional", "unet"]
    assert list(map(identify, found)) == [PIPELINE, TEXT_ENCODER, "diffusers-pipeline", UNET]


def test_links_below_the_root_are_not_followed(tmp_path: Path, new_unet: Callable) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    new_unet().save_pretrained(outside / "unet")
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "loop").symlink_to(root)
    (root / "away").symlink_to(outside)
    (root / "ckpt.pth").symlink_to(outside / "unet" / "diffusion_pytorch_model.safetensors")
    assert discover(root) == []


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    # permission bits do not stop root, which tests may run as
    scandir = os.scandir

    def refuse(path: object) -> object:
        if Path(str(path)) == locked:
            raise PermissionError(13, "denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert discover(tmp_path) == [locked]
