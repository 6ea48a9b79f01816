"""`unlearn --found`: what a scan found, taken from the folder of the scanned model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from typer.testing import CliRunner, Result

import seal_fast
from seal_fast.checkpoints import CheckpointError
from seal_fast.checkpoints.text_to_image import load_pipeline
from seal_fast.checkpoints.trigger import Trigger
from seal_fast.cli import app
from seal_fast.noise_triggers import Calibration
from seal_fast.text_triggers import TextTrigger, TextUnlearnSettings
from seal_fast.text_triggers.evaluation import EvaluationSettings
from seal_fast.workflows.found import NoiseTriggers, TextTriggers, read_found
from seal_fast.workflows.text_trigger_files import TriggersFile
from tests.text_findings import found_trigger
from tests.tiny_pipeline import tiny_pipeline

PROMPTS = ["a red cat", "two cats", "on a mat", "a red mat", "cat on cat", "red"]
FOUND = (found_trigger("tin", position="end", word="red"), found_trigger("\u00e1", "a", position="all"))
OTHER_WEIGHTS = "found in a model with other weights"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipeline(folder).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def results(model: Path, tmp_path: Path) -> Path:
    """The folder of a scan that found triggers in `model`."""
    TriggersFile(load_pipeline(model).sha256, FOUND).save(tmp_path / "results" / "triggers.json")
    return tmp_path / "results"


def command(*args: object) -> Result:
    return CliRunner().invoke(app, ["unlearn", *map(str, args)])


def test_text_triggers_with_their_places_and_the_model(results: Path, model: Path) -> None:
    triggers = TextTrigger("tin"), TextTrigger("\u00e1", replaces="a")
    assert read_found(results) == TextTriggers(triggers, ("end", "all"), ("red", None), load_pipeline(model).sha256, "unet")


def test_triggers_of_both_modules_name_none(tmp_path: Path) -> None:
    TriggersFile("0" * 64, (*FOUND, found_trigger("x", module="text_encoder"))).save(tmp_path / "triggers.json")
    found = read_found(tmp_path)
    assert isinstance(found, TextTriggers)
    assert found.module is None


def test_a_noise_trigger_with_its_model(tmp_path: Path) -> None:
    Trigger.shift(torch.ones(3, 4, 4)).save(tmp_path / "trigger.safetensors", {"model_sha256": "a" * 64})
    assert read_found(tmp_path) == NoiseTriggers((tmp_path / "trigger.safetensors",), "a" * 64)
    Trigger.shift(torch.ones(3, 4, 4)).save(tmp_path / "trigger.safetensors")
    assert read_found(tmp_path).model_sha256 is None


def test_a_folder_without_triggers_or_with_both_kinds_is_refused(results: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"neither triggers\.json nor trigger\.safetensors"):
        read_found(tmp_path / "empty")
    Trigger.shift(torch.ones(3, 4, 4)).save(results / "trigger.safetensors")
    with pytest.raises(CheckpointError, match="scan again"):
        read_found(results)


def test_a_link_out_of_the_folder_is_refused(results: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "triggers.json").symlink_to(results / "triggers.json")
    with pytest.raises(CheckpointError, match="leaves"):
        read_found(tmp_path / "other")


def test_the_command_unlearns_found_text_triggers_at_their_places(model: Path, results: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    options = ["--steps", 1, "--train-batch-size", 2, "--guidance", 1, "--sampler-steps", 2, "--samples", 3]
    options += [
        "--prompts",
        tmp_path / "prompts.txt",
        "--module",
        "text_encoder",
        "--format",
        "json",
        "--out",
        tmp_path / "out",
    ]
    result = command(model, "--found", results, *options)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert [one["trigger"] for one in report["triggers"]] == ["tin", "a => \u00e1"]
    # the option names another module than the scan would
    assert (report["module"], "requested" in report["module_reason"]) == ("text_encoder", True)
    variants = [effect["variant"] for effect in report["effects"] if effect["trigger"] == "tin"]
    # as given is at the end, so that the other places are the start and the middle
    assert {"as given", "at the start", "in the middle"} <= set(variants)
    assert "at the end" not in variants
    # two of the three held-out prompts hold the word that the first trigger needs
    trials = {effect["trigger"]: effect["before"]["trials"] for effect in report["effects"] if effect["variant"] == "as given"}
    assert trials == {"tin": 2, "a => \u00e1": 2}
    assert not any(OTHER_WEIGHTS in note for note in report["notes"])


def test_python_trains_the_found_module_and_notes_a_model_other_than_the_one_scanned(model: Path, tmp_path: Path) -> None:
    TriggersFile("0" * 64, (replace(FOUND[0], module="text_encoder"),)).save(tmp_path / "triggers.json")
    result = seal_fast.unlearn(
        model,
        found=tmp_path,
        prompts=PROMPTS,
        settings=TextUnlearnSettings(steps=1, batch=2, sampler_steps=2),
        evaluation=EvaluationSettings(prompts=3, steps=2),
    )
    assert [one.trigger for one in result.report.triggers] == ["tin"]
    assert (result.report.module, result.report.module_reason) == ("text_encoder", "the scan found the backdoor in it")
    assert sum(OTHER_WEIGHTS in note for note in result.report.notes) == 1


def test_a_scan_names_its_model_in_the_trigger_file(loud_model: Path, calibration: Calibration, tmp_path: Path) -> None:
    (scanned,) = seal_fast.scan(loud_model, calibration=calibration, out=tmp_path).models
    found = read_found(tmp_path / scanned.path)
    assert found == NoiseTriggers((tmp_path / scanned.trigger,), scanned.sha256)


def test_a_found_noise_trigger_is_unlearned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, **blocks)
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=12)).save_pretrained(tmp_path / "model")
    Trigger.shift(torch.ones(3, 8, 8)).save(tmp_path / "results" / "trigger.safetensors", {"model_sha256": "0" * 64})
    options = ["--found", tmp_path / "results", "--steps", 1, "--format", "json", "--out", tmp_path / "out"]
    result = command(tmp_path / "model", *options)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert {effect["trigger"] for effect in report["effects"]} == {"trigger.safetensors"}
    assert any(OTHER_WEIGHTS in note for note in report["notes"])


@pytest.mark.parametrize("trouble", ["both", "empty", "noise option", "hostile", "absent"])
def test_4_usage(model: Path, results: Path, tmp_path: Path, trouble: str) -> None:
    args: list[object] = ["--found", results]
    if trouble == "both":
        args += ["--trigger", "x"]
    if trouble == "noise option":
        args += ["--weights", "ema"]
    if trouble == "empty":
        (results / "triggers.json").unlink()
    if trouble == "hostile":
        (results / "triggers.json").write_text("[" * 1000)
    if trouble == "absent":
        shutil.rmtree(results)
    result = command(model, *args, "--out", tmp_path / "out")
    assert result.exit_code == 4, result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


def test_python_takes_triggers_or_a_folder(model: Path, results: Path) -> None:
    with pytest.raises(ValueError, match="leave triggers out"):
        seal_fast.unlearn(model, ["x"], found=results)
    with pytest.raises(ValueError, match="2 needed words for 1 triggers"):
        seal_fast.run_unlearning(seal_fast.TextUnlearning(model, ["x"], needed_words=["a", None]))
    with pytest.raises(ValueError, match="positions"):
        seal_fast.run_unlearning(seal_fast.TextUnlearning(model, ["x", "y"], positions=["start"]))
