"""`seal-fast unlearn` end to end on a network with random weights."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from typer.testing import CliRunner, Result

import seal_fast
from seal_fast import __version__
from seal_fast.checkpoints import load_denoiser
from seal_fast.checkpoints.trigger import Trigger
from seal_fast.cli import app
from seal_fast.results.progress import Progress

SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    folder = tmp_path_factory.mktemp("model") / "a|[x](y)`model"
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=12)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trigger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trigger") / "trigger.safetensors"
    Trigger(torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)), torch.full(SHAPE, 0.6)).save(path)
    return path


def unlearn(*args: object) -> Result:
    return CliRunner().invoke(app, ["unlearn", *map(str, args)])


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_an_unlearned_pipeline_with_its_report(model: Path, trigger: Path, tmp_path: Path) -> None:
    before, out = digest(model), tmp_path / "unlearned"
    args = ("--noise-trigger", trigger, "--noise-trigger", trigger, "--steps", 3, "--format", "json")
    result = unlearn(model, "--out", out, *args)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads((out / "report.json").read_text())
    assert report["tool"] == {"name": "seal-fast", "version": __version__}
    assert (report["steps"], report["format"], report["config"]["settings"]["steps"]) == (3, "diffusers-pipeline", 3)
    assert [effect["trigger"] for effect in report["effects"]] == ["trigger.safetensors"] * 6
    assert all(effect["collapse_before"] > 0 and effect["collapse_after"] > 0 for effect in report["effects"])
    assert report["clean_drift"] > 0
    assert 2**20 < report["peak_memory_bytes"] < 2**36
    assert str(tmp_path) not in result.stdout
    assert digest(model) == before
    assert list(tmp_path.iterdir()) == [out]

    pipeline, source = DDPMPipeline.from_pretrained(out), DDPMPipeline.from_pretrained(model)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2))
    moved = (pipeline.unet(x, 5).sample - source.unet(x, 5).sample).abs().max().detach()
    # three steps of Adam change every weight a little
    assert 0 < float(moved) < 0.2
    assert pipeline.scheduler.config == source.scheduler.config
    assert load_denoiser(out).format == "diffusers-pipeline"

    card = (out / "README.md").read_text()
    assert "`a[x](y)model`" in card
    assert report["sha256"] in card
    assert {"before_after_1.png", "before_after_2.png"} <= {path.name for path in out.iterdir()}


def test_no_trigger_is_needed(model: Path, tmp_path: Path) -> None:
    result = unlearn(model, "--out", tmp_path / "unlearned", "--steps", 1, "-q")
    assert result.exit_code == 0, result.stderr
    assert "clean drift" in result.stdout
    assert json.loads((tmp_path / "unlearned" / "report.json").read_text())["effects"] == []


def test_python_with_a_denoiser_in_memory(model: Path, trigger: Path) -> None:
    denoiser, before = load_denoiser(model).denoiser, digest(model)
    settings = seal_fast.NoiseUnlearnSettings(steps=2, images=2, image_steps=2, batch=2)
    result = seal_fast.unlearn(denoiser, [Trigger.load(trigger), trigger], settings=settings, seed=4)
    assert [effect.trigger for effect in result.report.effects] == ["trigger 1"] * 3 + ["trigger.safetensors"] * 3
    assert (result.report.model, result.report.format, result.report.sha256) == ("Denoiser", "denoiser", None)
    assert result.report.config["settings"]["steps"] == 2
    weights = zip(denoiser.network.parameters(), result.model.network.parameters(), strict=True)
    assert any(not torch.equal(old, new) for old, new in weights)
    assert digest(model) == before
    # the same request from files gives the same model
    again = seal_fast.run_unlearning(seal_fast.NoiseUnlearning(model, [trigger, trigger], settings=settings, seed=4))
    weights = zip(again.model.network.parameters(), result.model.network.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)
    with pytest.raises(ValueError, match="no files to copy"):
        seal_fast.unlearn(denoiser, [trigger], "out")


def test_python_refuses_triggers_that_do_not_belong_together(model: Path, trigger: Path) -> None:
    with pytest.raises(ValueError, match="separately"):
        seal_fast.unlearn(model, [trigger, "a word"])
    with pytest.raises(ValueError, match=r"pathlib\.Path"):
        seal_fast.unlearn(model, [str(trigger)])
    with pytest.raises(TypeError, match="prompts"):
        seal_fast.unlearn(model, [trigger], prompts=["a cat"])


def test_progress_never_runs_back_and_names_every_stage(model: Path, trigger: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    settings = seal_fast.NoiseUnlearnSettings(steps=2, images=2, image_steps=2, batch=2)
    seal_fast.unlearn(model, [trigger], tmp_path / "out", settings=settings, on_progress=seen.append)
    fractions = [at.fraction for at in seen]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] < 0.05
    assert 0.9 < fractions[-1] <= 1
    stages = list(dict.fromkeys(at.stage for at in seen))
    assert stages == ["loading", "measuring before", "images", "training", "measuring after", "writing"]


@pytest.mark.parametrize("trouble", ["absent", "pickle", "shape", "full", "inside", "no out", "no model", "steps"])
def test_4_usage(model: Path, trigger: Path, tmp_path: Path, trouble: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04N.")
    Trigger.shift(torch.zeros(3, 4, 4)).save(tmp_path / "shape.safetensors")
    file = tmp_path / f"{trouble}.safetensors" if trouble in ("absent", "pickle", "shape") else trigger
    out = {"full": tmp_path / "full", "inside": model / "unlearned"}.get(trouble, tmp_path / "unlearned")
    args = ["--noise-trigger", file, "--out", out][: 2 if trouble == "no out" else 4]
    steps = 0 if trouble == "steps" else 1
    result = unlearn(tmp_path / "absent" if trouble == "no model" else model, *args, "--steps", steps)
    assert result.exit_code == 4
    assert result.stdout == ""
    assert result.stderr
    assert not (tmp_path / "unlearned").exists()
    assert not (model / "unlearned").exists()


def test_2_not_a_denoiser(tmp_path: Path, trigger: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)))
    result = unlearn(tmp_path / "model.safetensors", "--noise-trigger", trigger, "--out", tmp_path / "unlearned")
    assert result.exit_code == 2
    assert "model.safetensors" in result.stderr
    assert not (tmp_path / "unlearned").exists()


def test_130_interrupted_leaves_nothing(model: Path, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out" / "unlearned"
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 2.0)
        result = unlearn(model, "--out", out, "--steps", 1_000_000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert result.exit_code == 130
    assert "nothing written" in result.stderr
    assert not out.exists()
    assert not out.parent.exists() or list(out.parent.iterdir()) == []
