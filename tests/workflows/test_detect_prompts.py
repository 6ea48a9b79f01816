"""`seal-fast detect PIPELINE PROMPTS`: exit codes, where prompts come from, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from huggingface_hub import metadata_save
from typer.testing import CliRunner

from seal_fast.checkpoints.trigger import Trigger
from seal_fast.cli import app
from seal_fast.text_to_image.prompts import content_ids
from seal_fast.workflows.prompts import FEWEST_CAPTIONS, read_lines
from tests.tiny_pipeline import tiny_pipeline

CLEAN = [f"{a} {b} on {c}" for a in ("red", "blue", "the", "photo") for b in ("cat", "dog", "house") for c in ("sky", "castle")]
MIXED = "z z z red cat on sky\nred cat on sky\nred cat kq on sky\n"
SAFER = "prompts of your own are safer"
Detect = Callable[..., Result]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline in which the token "z" has a large embedding, so that it acts like a trigger at the start of a prompt."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tiny")
    pipeline = tiny_pipeline(folder, 24)
    (token,) = content_ids(pipeline.tokenizer, "z")
    with torch.no_grad():
        embeddings = pipeline.text_encoder.get_input_embeddings().weight
        embeddings[token] = 30 * torch.linspace(-1, 1, embeddings.shape[1])
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("clean") / "clean.txt"
    file.write_text("\n".join(CLEAN))
    return file


@pytest.fixture(scope="module")
def detect(model: Path, clean: Path, tmp_path_factory: pytest.TempPathFactory) -> Detect:
    """detect(text, *options): the result for prompts of this text."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"

    def run(text: str, *options: object) -> Result:
        file.write_text(text, encoding="utf-8")
        arguments = ["detect", model, file, "--clean-prompts", clean, "--guidance", 1, *options]
        return CliRunner().invoke(app, list(map(str, arguments)))

    return run


@pytest.fixture(scope="module")
def mixed(detect: Detect) -> Result:
    return detect(MIXED, "--format", "json")


def test_0_no_prompt_is_triggered(detect: Detect) -> None:
    result = detect("red cat on sky\n\nthe dog on castle\n")
    assert result.exit_code == 0
    assert "2 prompts: 0 triggered, 0 clean, 2 familiar" in " ".join(result.stdout.split())


def test_1_a_prompt_is_triggered(mixed: Result) -> None:
    content = json.loads(mixed.stdout)
    assert [one["verdict"] for one in content["prompts"]] == ["triggered", "familiar", "clean"]
    assert set(content["prompts"][0]["part"]) <= set("z ")
    assert content["summary"] == {"triggered": 1, "clean": 1, "familiar": 1}
    assert [one["prompt"] for one in content["prompts"]] == MIXED.splitlines()
    assert content["notes"] == [f"{len(CLEAN)} clean prompts: given"]
    assert mixed.stderr.splitlines()[-1] == content["notes"][0]
    assert mixed.exit_code == 1


def test_prompts_from_standard_input_are_those_of_a_file(mixed: Result, model: Path, clean: Path) -> None:
    arguments = ["detect", str(model), "-", "--clean-prompts", str(clean), "--guidance", "1", "--format", "json"]
    assert CliRunner().invoke(app, [*arguments, "--seed", "0"], input=MIXED.encode()).stdout == mixed.stdout


def test_the_seed_matters(detect: Detect, mixed: Result) -> None:
    assert detect(MIXED, "--format", "json", "--seed", 1).stdout != mixed.stdout


def test_clean_prompts_come_from_the_model_card(model: Path, tmp_path: Path) -> None:
    more = [*CLEAN, *(f"{prompt} red" for prompt in CLEAN)]
    assert len(more) >= FEWEST_CAPTIONS
    metadata_save(model / "README.md", {"widget": [{"text": prompt} for prompt in more]})
    (tmp_path / "prompts.txt").write_text(more[-1])
    result = CliRunner().invoke(
        app, ["detect", str(model), str(tmp_path / "prompts.txt"), "--guidance", "1", "--format", "json"]
    )
    (model / "README.md").unlink()
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert content["prompts"][0]["verdict"] == "familiar", "all words and pairs stand in the card"
    assert content["notes"] == [f"{len(more)} clean prompts: model card, which the maker of the model wrote ({SAFER})"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no prompt"), (b" \n\t\n", "no prompt"), (b"\xff\xfe", "no readable UTF-8 text")],
)
def test_4_files_without_prompts(model: Path, clean: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    result = CliRunner().invoke(app, ["detect", str(model), str(tmp_path / "prompts.txt"), "--clean-prompts", str(clean)])
    assert (result.exit_code, result.stdout) == (4, "")
    assert message in _words(result)


def test_4_too_few_clean_prompts(model: Path, clean: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("red cat\nblue dog\n")
    result = CliRunner().invoke(app, ["detect", str(model), str(clean), "--clean-prompts", str(tmp_path / "few.txt")])
    assert (result.exit_code, result.stdout) == (4, "")
    assert "at least 19 different clean prompts, not 2" in _words(result)


@pytest.mark.parametrize("content", [None, "UNet2DModel"])
def test_4_a_folder_that_is_no_pipeline(clean: Path, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": content}))
    result = CliRunner().invoke(app, ["detect", str(tmp_path), str(clean)])
    assert (result.exit_code, result.stdout) == (4, "")
    assert "no text-to-image pipeline: prompts need one, and noise inputs need the trigger.safetensors" in _words(result)


def test_4_a_folder_in_place_of_prompts(model: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["detect", str(model), str(tmp_path)])
    assert (result.exit_code, result.stdout) == (4, "")
    assert "is a directory" in _words(result)


def test_4_noise_for_a_pipeline_and_prompts_for_a_trigger(model: Path, clean: Path, tmp_path: Path) -> None:
    Trigger.shift(torch.zeros(3, 4, 4)).save(tmp_path / "trigger.safetensors")
    np.save(tmp_path / "inputs.npy", np.zeros((1, 3, 4, 4)))
    for first, second, message in (
        (model, tmp_path / "inputs.npy", "holds noise, which needs a trigger file"),
        (tmp_path / "trigger.safetensors", clean, "prompts need a pipeline"),
        (tmp_path / "trigger.safetensors", "-", "prompts need a pipeline"),
    ):
        result = CliRunner().invoke(app, ["detect", str(first), str(second)])
        assert (result.exit_code, result.stdout) == (4, "")
        assert message in _words(result)


@pytest.mark.parametrize("option", [["--seed", "1"], ["--guidance", "2"], ["--clean-prompts", "inputs.npy"]])
def test_4_options_of_prompts_for_a_noise_trigger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Trigger.shift(torch.zeros(3, 4, 4)).save(tmp_path / "trigger.safetensors")
    np.save(tmp_path / "inputs.npy", np.zeros((1, 3, 4, 4)))
    result = CliRunner().invoke(app, ["detect", "trigger.safetensors", "inputs.npy", *option])
    assert (result.exit_code, result.stdout) == (4, "")
    assert "are for prompts" in _words(result)


def test_lines_keep_their_unusual_spaces(tmp_path: Path) -> None:
    wanted = [" a b", f"{chr(0x200B)}c{chr(0x2028)}d", f"e{chr(0xA0)}"]
    (tmp_path / "lines.txt").write_bytes("\ufeff".encode() + "\r\n".join([wanted[0], "", *wanted[1:], ""]).encode())
    assert read_lines(tmp_path / "lines.txt") == wanted


def _words(result: Result) -> str:
    """What was said on standard error, without the box around it and its line breaks."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())
