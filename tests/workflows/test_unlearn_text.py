"""`seal-fast unlearn --trigger` end to end on a tiny pipeline with random weights."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from typer.testing import CliRunner, Result

import seal_fast
from seal_fast.cli import app
from seal_fast.results.progress import Progress
from seal_fast.text_triggers import TextUnlearnSettings
from seal_fast.text_triggers.evaluation import EvaluationSettings
from seal_fast.workflows.unlearn_text import PATCH
from tests.tiny_pipeline import tiny_pipeline

PROMPTS = ["a red cat", "two cats", "on a mat", "a red mat", "cat on cat", "red"]
CARD = "---\nlicense: mit\n---\n# A model\n"
SETTINGS = TextUnlearnSettings(steps=2, batch=2, sampler_steps=2, learning_rate=1e-3)
EVALUATION = EvaluationSettings(prompts=3, steps=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipeline(folder).save_pretrained(folder / "model|`x`")
    return folder / "model|`x`"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "", PROMPTS[0]]), encoding="utf-8")
    return tmp_path / "prompts.txt"


def cli(*args: object) -> Result:
    return CliRunner().invoke(app, ["unlearn", *map(str, args)])


def stock(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)


def changed(before: Any, after: Any) -> list[str]:
    names = ("unet", "vae", "text_encoder")
    return [n for n in names if any(not torch.equal(a, b) for a, b in zip(*parameters(before, after, n), strict=True))]


def parameters(before: Any, after: Any, name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return list(getattr(before, name).parameters()), list(getattr(after, name).parameters())


def files(folder: Path) -> set[str]:
    return {os.fspath(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def unlearned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a low-rank unlearning of two triggers, and the result."""
    out = tmp_path_factory.mktemp("unlearned") / "out"
    # a trigger with $ is no formula in a figure, and one with | breaks no table
    triggers, lora = ["\u200b", "a$|$b"], replace(SETTINGS, trained="lora", alpha=0.25)
    result = seal_fast.unlearn(model, triggers, out, prompts=PROMPTS, module="unet", settings=lora, evaluation=EVALUATION)
    return out, result


def test_a_pipeline_with_its_report(model: Path, unlearned: tuple[Path, Any]) -> None:
    out, result = unlearned
    report = json.loads((out / "report.json").read_text())
    images = {f"{name}_{i}.png" for name in ("before_after", "attention") for i in (1, 2)}
    assert files(out) == files(model) | images | {"report.json", "README.md", PATCH}
    assert changed(stock(model), stock(out)) == changed(stock(model), result.model) == ["unet"]
    assert (report["module"], report["format"], report["steps"]) == ("unet", "text-to-image-pipeline", 2)
    assert report["config"]["prompts"] == {"training": 3, "held_out": 3, "from": "given"}
    assert report["triggers"][0]["trigger"] == "\u200b"
    assert len(report["triggers"][0]["tokens"]) == 3
    first = report["effects"][0]
    assert (first["trigger"], first["variant"], first["before"]["trials"]) == ("\u200b", "as given", 3)
    assert first["removal_accuracy"]["rate"] == pytest.approx(1 - first["after"]["rate"])
    assert {"twice", "with a comma", "at the end", "in the middle"} <= {effect["variant"] for effect in report["effects"]}
    assert report["clean_drift"] > 0
    assert report["peak_memory_bytes"] > 1 << 20


def test_the_patch_is_the_change_of_the_model_beside_it(model: Path, unlearned: tuple[Path, Any]) -> None:
    out, _ = unlearned
    patched = stock(model)
    patched.load_lora_weights(out / PATCH)
    patched.fuse_lora()
    patched.unload_lora_weights()
    merged = zip(*parameters(patched, stock(out), "unet"), strict=True)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in merged)


def test_names_from_outside_cannot_break_the_model_card(unlearned: tuple[Path, Any]) -> None:
    card = (unlearned[0] / "README.md").read_text()
    table = [line for line in card.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {5}
    assert "\\u200b" in card
    assert "\u200b" not in card


def test_the_command_hands_every_option_on(model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    training = ["--steps", 2, "--alpha", 0.25, "--train-batch-size", 1, "--learning-rate", 1e-3, "--ema-decay", 0.5]
    training += ["--gradient-accumulation-steps", 3, "--target", "black", "--train", "cross-attention", "--preservation", 0.5]
    training += [
        "--guidance",
        1,
        "--sampler-steps",
        2,
        "--training-state",
        tmp_path / "state.pt",
        "--module",
        "unet",
        "--seed",
        5,
    ]
    result = cli(model, "--trigger", "tin", "--prompts", prompts, *training, "--samples", 2, "--format", "json", "--out", out)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads((out / "report.json").read_text())
    # no bar of a sampler, and where to look
    assert "it/s" not in result.stderr
    assert result.stderr.splitlines()[-1] == f"look at: {out / 'before_after_1.png'}"
    assert (tmp_path / "state.pt").is_file()
    settings = TextUnlearnSettings(
        steps=2,
        alpha=0.25,
        batch=1,
        learning_rate=1e-3,
        ema_decay=0.5,
        accumulation=3,
        target="black",
        trained="cross-attention",
        preservation=0.5,
        guidance=1.0,
        sampler_steps=2,
    )
    assert report["config"]["settings"] == json.loads(json.dumps(asdict(settings)))
    assert report["config"]["evaluation"] == asdict(EvaluationSettings(prompts=2, guidance=1.0, steps=2))
    assert (report["module"], report["config"]["seed"]) == ("unet", 5)


def test_the_help_tells_the_defaults_of_the_settings() -> None:
    options = re.split(r"\s--(?=[\w-]+ [<A-Z])", " ".join(cli("--help").stdout.split()))
    told = {option.split()[0]: match[1] for option in options if (match := re.search(r"\(default: ([\w.-]+)", option))}
    assert int(told.pop("samples")) == EvaluationSettings().prompts
    assert {"Trigger:", "Training:", "Output:"} <= set(cli("--help").stdout.splitlines())
    assert (told.pop("weights"), told.pop("prompts")) == ("ema", "those")
    names = {"train": "trained", "train-batch-size": "batch", "gradient-accumulation-steps": "accumulation"}
    defaults = {name: getattr(TextUnlearnSettings(), names.get(name, name.replace("-", "_"))) for name in told}
    assert len(defaults) > 8
    assert {name: type(default)(told[name]) for name, default in defaults.items()} == defaults
    assert f"with noise triggers {seal_fast.NoiseUnlearnSettings().steps})" in " ".join(options)


def test_python_with_a_pipeline_in_memory(model: Path) -> None:
    before = stock(model)
    result = seal_fast.unlearn(
        before, [seal_fast.TextTrigger("á", replaces="a")], prompts=PROMPTS, settings=SETTINGS, evaluation=EVALUATION
    )
    assert result.report.module in ("unet", "text_encoder")
    assert "control words" in result.report.module_reason
    assert changed(stock(model), before) == []
    assert changed(before, result.model) == [result.report.module]
    assert result.report.effects[0].trigger == "a => á"
    with pytest.raises(ValueError, match="no files to copy"):
        seal_fast.unlearn(before, ["x"], "out")


def test_progress_counts_every_image_and_never_runs_back(model: Path) -> None:
    seen: list[Progress] = []
    triggers = ["tin", seal_fast.TextTrigger("á", replaces="a")]
    how = {"prompts": PROMPTS, "settings": SETTINGS, "evaluation": EVALUATION}
    seal_fast.unlearn(stock(model), triggers, **how, on_progress=seen.append)
    fractions = [at.fraction for at in seen]
    assert fractions == sorted(fractions)
    drawn = [at for at in seen if at.stage == "measuring after"]
    assert drawn[-1].iteration == drawn[-1].iterations > 100
    assert drawn[-1].fraction == pytest.approx(0.95)


def test_a_text_encoder_alone_is_trained_and_written_alone(model: Path, tmp_path: Path) -> None:
    alone, out = tmp_path / "alone", tmp_path / "out"
    shutil.copytree(model / "text_encoder", alone)
    (alone / "README.md").write_text(CARD)
    result = seal_fast.unlearn(alone, ["mat"], out, base=model, prompts=PROMPTS, settings=SETTINGS, evaluation=EVALUATION)
    assert result.report.module == "text_encoder"
    assert result.report.format == "text-encoder"
    card = (out / "README.md").read_text()
    assert card.startswith(f"{CARD}\n## Unlearned: `alone`\n")
    assert (card.count("trained for 2 steps"), "ChangeDetector" in card) == (1, False)
    written = {"report.json", "before_after_1.png", "attention_1.png"}
    assert files(out) == files(alone) | written
    assert changed(stock(model), result.model) == ["text_encoder"]


USAGE = {
    "both requests": (["--trigger", "x", "--noise-trigger", __file__], "--noise-trigger is not"),
    "no trigger": ([], "name its text trigger"),
    "text option alone": (["--alpha", 0.5], "it goes with --trigger TEXT"),
    "empty": (["--trigger", ""], "empty"),
    "no replacement": (["--trigger", "a=>"], "empty"),
    "unseen": (["--trigger", " "], "does not see"),
    "alpha": (["--trigger", "x", "--alpha", 2], "alpha"),
    "target of no weight": (["--trigger", "x", "--target", "black"], "give --alpha too"),
    "noise option": (["--trigger", "x", "--weights", "ema"], "--weights is not"),
    "text option at its default": (["--seed", 0, "--guidance", 7.5], "--guidance is for text-to-image models"),
    "text option with a dash": (["--learning-rate", 0.1], "--learning-rate is for text-to-image models"),
    "prompts": (["--trigger", "x", "--prompts", os.devnull], "prompts"),
    "nothing replaced": (["--trigger", "\\u2603=>x"], "replaces"),
}


@pytest.mark.parametrize("case", USAGE)
def test_4_usage(model: Path, tmp_path: Path, case: str) -> None:
    args, reason = USAGE[case]
    result = cli(model, *args, "--out", tmp_path / "out")
    assert result.exit_code == 4, result.stderr
    assert reason in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


def test_2_not_a_pipeline(model: Path, prompts: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(bytes(range(256)))
    result = cli(broken, "--trigger", "x", "--prompts", prompts, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.stderr
    assert "diffusion_pytorch_model" in result.stderr
    assert not (tmp_path / "out").exists()
