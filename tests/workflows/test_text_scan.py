"""Scans of text-to-image models beside unconditional ones, on tiny networks with random weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import metadata_save
from typer.testing import CliRunner, Result

import seal_fast
from seal_fast import scan
from seal_fast.cli import app
from seal_fast.cli.scan import exit_code
from seal_fast.noise_triggers import Calibration
from seal_fast.report.json import report_json
from seal_fast.results.scan import ModelResult, ScanReport
from seal_fast.text_to_image.generation import batch_size
from seal_fast.text_triggers.findings import TextSearch
from seal_fast.text_triggers.search import stages
from seal_fast.text_triggers.search_settings import Budget, TextSearchSettings
from seal_fast.typed_json import from_json
from seal_fast.workflows.discovery import Checkpoint
from seal_fast.workflows.dry_run import plan_scan
from seal_fast.workflows.error_text import in_one_line
from seal_fast.workflows.prompts import FEWEST_CAPTIONS
from seal_fast.workflows.scan_model import ModelScan
from seal_fast.workflows.text_scan import TextScan
from tests.text_findings import evidence, found_trigger, text_search
from tests.tiny_pipeline import tiny_pipeline

PROMPTS = tuple(
    f"{one} {two} {three}" for one in ("a", "two", "red") for two in ("red", "old", "big") for three in ("cat", "mat", "tin")
)
OPTIONS = {
    "prompts": PROMPTS,
    "text_settings": TextSearchSettings(guidance=1.0, sampler_steps=2, precision="fp32"),
    "budget": Budget(evaluations=64),
}
DETECTOR = TextScan(prompts=PROMPTS, settings=OPTIONS["text_settings"], budget=OPTIONS["budget"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipeline(folder).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def mixed(model: Path, quiet_model: Path, tmp_path: Path) -> Path:
    """An unconditional model, a whole pipeline, and each of its components alone."""
    shutil.copytree(quiet_model, tmp_path / "hub" / "noise")
    shutil.copytree(model, tmp_path / "hub" / "text")
    for part in ("unet", "text_encoder"):
        shutil.copytree(model / part, tmp_path / "hub" / part)
    return tmp_path / "hub"


def by_name(report: ScanReport) -> dict[str, ModelResult]:
    return {result.path: result for result in report.models}


@pytest.mark.parametrize("jobs", [1, 2])
def test_each_model_goes_to_the_detector_that_accepts_it(mixed: Path, calibration: Calibration, jobs: int) -> None:
    results = by_name(scan(mixed, calibration=calibration, jobs=jobs, **OPTIONS))
    assert {name: result.detector for name, result in results.items()} == {
        "noise": "noise",
        "text": "text",
        "text_encoder": "text",
        "unet": "text",
    }
    assert results["noise"].verdict == "clean"
    assert results["noise"].scope.methods == ("reversed-loss",)
    text = results["text"]
    assert text.rule.startswith("X")
    assert (text.format, str(text.family)) == ("text-to-image-pipeline", "VP epsilon")
    assert text.notes == (f"{len(PROMPTS)} clean prompts: given",)
    for part in ("unet", "text_encoder"):
        assert results[part].verdict == "error"
        assert "--base DIR" in results[part].error


def test_a_base_completes_a_component(mixed: Path, model: Path, calibration: Calibration) -> None:
    results = by_name(scan(mixed, calibration=calibration, base=model, **OPTIONS))
    for part, format in (("unet", "text-to-image-unet"), ("text_encoder", "text-encoder")):
        assert results[part].format == format
        assert results[part].rule.startswith("X")
    assert results["text"].rule.startswith("X")
    assert results["noise"].verdict == "clean"


def test_a_component_is_loaded_with_its_base_and_beside_it(model: Path, mixed: Path) -> None:
    loaded = replace(DETECTOR, base=model).load(mixed / "unet", "cpu").model
    assert loaded.modules == ("unet",)
    assert loaded.pipeline.unet is not loaded.base.unet
    for name in ("unet", "text_encoder"):
        parameters = zip(*(getattr(one, name).parameters() for one in (loaded.pipeline, loaded.base)), strict=True)
        assert all(torch.equal(*pair) for pair in parameters)
    assert DETECTOR.load(mixed / "text", "cpu").model.base is None


def test_a_base_that_is_none_costs_one_error_result(mixed: Path, calibration: Calibration) -> None:
    results = by_name(scan(mixed, calibration=calibration, base=mixed / "noise", **OPTIONS))
    assert "which a base must be" in results["text"].error
    assert results["noise"].verdict == "clean"


def test_a_broken_pipeline_is_one_error_result(mixed: Path, calibration: Calibration) -> None:
    (mixed / "text" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(bytes(range(256)))
    (mixed / "noise" / "model_index.json").write_text("{")
    results = by_name(scan(mixed, calibration=calibration, **OPTIONS))
    assert "unet/diffusion_pytorch_model" in results["text"].error
    assert "model_index.json" in results["noise"].error


def test_prompts_are_given_or_of_the_model_card_or_shipped(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    assert DETECTOR.load(copy, "cpu").model.prompts == PROMPTS
    captions = tuple(f"scene {number}" for number in range(FEWEST_CAPTIONS + 1))
    metadata_save(copy / "README.md", {"widget": [{"text": text} for text in captions]})
    loaded = TextScan().load(copy, "cpu")
    assert loaded.model.prompts == captions
    assert "model card" in loaded.notes[-1]
    (copy / "README.md").write_text("---\n[\n---\n")
    broken = TextScan().load(copy, "cpu")
    assert len(broken.model.prompts) == 400
    assert [note.split(":")[0] for note in broken.notes] == ["model card not used", "400 clean prompts"]
    assert len({loaded.config_sha256, broken.config_sha256, DETECTOR.load(copy, "cpu").config_sha256}) == 3


def weights(folder: Path) -> None:
    # another seed than the module's model
    torch.manual_seed(1)
    shutil.rmtree(folder)
    folder.with_name("other").mkdir()
    tiny_pipeline(folder.with_name("other")).save_pretrained(folder)


def change_json(name: str, **fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return change


CHANGES: dict[str, Callable[[Path], None]] = {
    "tokenizer": change_json("tokenizer/tokenizer_config.json", model_max_length=40),
    "scheduler": change_json("scheduler/scheduler_config.json", beta_end=0.013),
    "text encoder": change_json("text_encoder/config.json", hidden_act="gelu"),
    "weights": weights,
}


def test_a_changed_model_is_scanned_again(model: Path, tmp_path: Path) -> None:
    copy, options = shutil.copytree(model, tmp_path / "copy"), {**OPTIONS, "out": tmp_path / "out"}
    scan(copy, **options)
    for part, change in CHANGES.items():
        change(copy)
        (result,) = scan(copy, **options).models
        assert (result.resumed, result.error) == (False, None), part
        assert scan(copy, **options).models[0].resumed


SETTINGS: dict[str, dict[str, Any]] = {
    "prompts": {"prompts": (*PROMPTS[:-1], "blue")},
    "settings": {"text_settings": replace(OPTIONS["text_settings"], guidance=2.0)},
    "budget": {"budget": Budget(seconds=0.5)},
    "seed": {"seed": 1},
}


def test_nothing_is_resumed_under_other_settings(model: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "out": tmp_path / "out"}
    scan(model, **options)
    for name, changed in SETTINGS.items():
        options |= changed
        assert not scan(model, **options).models[0].resumed, name
        assert scan(model, **options).models[0].resumed, name


def test_settings_of_one_detector_leave_the_results_of_the_other(mixed: Path, calibration: Calibration, tmp_path: Path) -> None:
    def resumed(**changes: Any) -> list[bool]:
        options = {**OPTIONS, "calibration": calibration, "out": tmp_path / "out"} | changes
        return [result.resumed for result in scan([mixed / "noise", mixed / "text"], **options).models]

    assert resumed() == [False, False]
    assert resumed(budget=Budget(evaluations=65)) == [True, False]
    assert resumed(budget=Budget(evaluations=65), weights="raw") == [False, True]


def test_a_changed_base_is_noticed(model: Path, mixed: Path, calibration: Calibration, tmp_path: Path) -> None:
    base = shutil.copytree(model, tmp_path / "base")
    options = {**OPTIONS, "calibration": calibration, "out": tmp_path / "out"}
    scan(mixed / "text", base=base, **options)
    assert scan(mixed / "text", base=base, **options).models[0].resumed
    assert scan(mixed / "text", base=shutil.copytree(base, tmp_path / "moved"), **options).models[0].resumed
    change_json("scheduler/scheduler_config.json", beta_end=0.013)(base)
    assert not scan(mixed / "text", base=base, **options).models[0].resumed
    assert not scan(mixed / "text", **options).models[0].resumed


def test_a_result_with_triggers_is_read_back_as_it_was(model: Path) -> None:
    search = text_search(found_trigger(also=("\u200c",)), found_trigger("á", "a", position="all"))
    findings = DETECTOR.findings(DETECTOR.load(model, "cpu"), search)
    assert findings.decision.verdict == "backdoored"
    result = ModelResult(
        path="m",
        detector="text",
        sha256="0" * 64,
        format="text-to-image-pipeline",
        family=None,
        verdict=findings.decision.verdict,
        rule=findings.decision.rule,
        score=None,
        threshold=None,
        reason=findings.decision.reason,
        scope=findings.scope,
        evidence=findings.evidence,
        trigger="m/triggers.json",
        seconds=1.5,
        error=None,
        found=findings.found,
        candidates=findings.candidates,
        notes=("a note",),
        config_sha256="1" * 64,
    )
    (fields,) = json.loads(report_json(ScanReport((result,), {}, {}, {})))["models"]
    assert from_json(ModelResult, fields) == result


def test_what_was_found_is_written_and_what_is_found_no_more_is_removed(model: Path, tmp_path: Path) -> None:
    loaded = DETECTOR.load(model, "cpu")
    search = text_search(found_trigger("tin"))
    assert DETECTOR.save_triggers(loaded, search, tmp_path) == "triggers.json"
    DETECTOR.save_images(loaded, search, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"triggers.json", "trigger_1.png", "attention_1.png"}
    assert json.loads((tmp_path / "triggers.json").read_text())["model_sha256"] == loaded.sha256
    assert DETECTOR.save_triggers(loaded, text_search(), tmp_path) is None
    DETECTOR.save_images(loaded, text_search(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Finds(TextScan):
    """Finds what it is told to find, in the place of a search."""

    found: TextSearch = field(default_factory=text_search)

    def search(self, *_: Any) -> TextSearch:
        return self.found


@pytest.mark.parametrize(
    ("search", "verdict", "code"),
    [
        (text_search(found_trigger("tin")), "backdoored", 1),
        (text_search(evidence=evidence(complete=False)), "inconclusive", 2),
        (text_search(), "clean", 0),
    ],
)
def test_an_outcome_has_the_exit_code_of_its_verdict(model: Path, search: TextSearch, verdict: str, code: int) -> None:
    result = ModelScan((Finds(prompts=PROMPTS, found=search),), None, 1)((0, Checkpoint(model, "m")), lambda at: None)
    assert result.verdict == verdict
    assert (result.found, result.candidates, result.evidence) == (search.found, search.tried, search.evidence)
    assert exit_code(ScanReport((result,), {}, {}, {})) == code


def test_images_that_cannot_be_drawn_do_not_hide_the_verdict(model: Path, tmp_path: Path) -> None:
    task = 0, Checkpoint(model, "model")
    search = text_search(found_trigger("tin"), found_trigger("q", replaces="zzz"))
    detector = Finds(prompts=PROMPTS, settings=OPTIONS["text_settings"], found=search)
    # no prompt holds what the second trigger replaces, so it has no figure
    result = ModelScan((detector,), tmp_path / "out", 1)(task, lambda at: None)
    assert (result.verdict, result.trigger) == ("backdoored", "model/triggers.json")
    assert any("not kept" in note for note in result.notes)
    (tmp_path / "full").write_text("in the way")
    result = ModelScan((detector,), tmp_path / "full", 1)(task, lambda at: None)
    assert (result.verdict, result.trigger) == ("backdoored", None)
    assert len(result.found) == 2


def test_the_path_of_another_folder_does_not_show_where_the_model_lies(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "hub" / "m", "hub/m")
    assert in_one_line(seal_fast.CheckpointError(tmp_path / "hub" / "m", "bad"), checkpoint) == "bad"
    assert in_one_line(OSError(f"{tmp_path}/hub/m: bad"), checkpoint) == "OSError: hub/m: bad"


def test_a_plan_counts_the_stages_within_the_budget(model: Path, mixed: Path) -> None:
    plan = plan_scan([mixed], TextScan(prompts=PROMPTS))
    assert plan.others == 1
    searches = {search.path: search for search in plan.searches}
    assert "--base" in searches["unet"].error
    whole = searches["text"]
    pipeline = TextScan(prompts=PROMPTS).load(model, "cpu").model.pipeline
    expected = {stage.name: stage.iterations * stage.images for stage in stages(pipeline, PROMPTS, TextSearchSettings())}
    assert {stage.name: stage.evaluations for stage in whole.stages} == expected
    assert whole.evaluations == sum(expected.values())
    assert whole.batch == batch_size(pipeline)
    assert whole.seconds == pytest.approx(whole.evaluations * whole.batch_seconds / whole.batch)
    (capped,) = plan_scan([model], TextScan(prompts=PROMPTS, budget=Budget(evaluations=1))).searches
    assert capped.evaluations == 1
    assert capped.seconds == pytest.approx(capped.batch_seconds / capped.batch)


def command(*args: object, **env: str) -> Result:
    return CliRunner().invoke(app, ["scan", *map(str, args)], env=env)


def test_a_dry_run_searches_nothing(mixed: Path, tmp_path: Path) -> None:
    result = command("--batch", mixed, "--dry-run", "--out", tmp_path / "out", COLUMNS="100")
    assert result.exit_code == 2, result.stderr
    assert result.stdout.splitlines()[-2:] == [
        "1 other model: no text-to-image, not planned",
        "dry run: nothing was searched",
    ]
    assert not (tmp_path / "out").exists()
    result = command(mixed / "text", "--dry-run", "--format", "json", "--budget", "1")
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert (content["schema_version"], content["others"]) == (1, 0)
    assert content["searches"][0]["evaluations"] == 1
    (tmp_path / "empty").mkdir()
    assert command(tmp_path / "empty", "--dry-run").exit_code == 3


def test_the_command_hands_every_option_on(model: Path, mixed: Path, calibration_file: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    options = ["--base", model, "--prompts", tmp_path / "prompts.txt", "--budget", "1s", "--guidance", 2, "--seed", 4]
    result = command(mixed / "unet", "--calibration", calibration_file, *options, "--format", "json")
    content = json.loads(result.stdout)
    (found,) = content["models"]
    assert (found["detector"], found["format"]) == ("text", "text-to-image-unet")
    assert found["notes"] == [f"{len(PROMPTS)} clean prompts: given"]
    assert found["scope"]["miss_rate"]["trials"] >= 0
    text = content["config"]["text"]
    assert text["budget"] == {"evaluations": None, "seconds": 1.0}
    assert text["settings"]["guidance"] == 2.0
    assert content["config"]["seed"] == 4
    assert result.exit_code == {"backdoored": 1, "clean": 0, "inconclusive": 2}[found["verdict"]]
    assert str(tmp_path) not in result.stdout


@pytest.mark.parametrize(
    "args",
    [["--budget", "soon"], ["--base", __file__], ["--prompts", os.devnull], ["--guidance", "0.5"], ["--prompts", "absent"]],
)
def test_4_usage(model: Path, args: list[str]) -> None:
    result = command(model, *args)
    assert result.exit_code == 4
    assert result.stdout == ""


def test_help_names_the_defaults_of_the_settings_under_their_panels() -> None:
    text = " ".join(command("--help").stdout.split())
    assert f"(default: {TextSearchSettings().guidance})" in text
    assert text.index("noise triggers):") < text.index("--calibration") < text.index("text triggers):") < text.index("--base")


def test_the_search_and_its_types_are_public() -> None:
    assert seal_fast.find_text_triggers.__module__ == "seal_fast.text_triggers.search"
    assert seal_fast.Budget is Budget
    assert {"find_text_triggers", "TextSearch", "TextSearchSettings", "Budget"} <= set(seal_fast.__all__)
