"""triggers.json and the figures of confirmed text triggers."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from seal_fast.checkpoints import CheckpointError
from seal_fast.checkpoints.files import MAX_JSON_BYTES
from seal_fast.results.environment import tool
from seal_fast.text_to_image.generation import generate
from seal_fast.text_triggers import TextTrigger
from seal_fast.text_triggers.rate import rate_of
from seal_fast.text_triggers.search_settings import TextSearchSettings
from seal_fast.workflows.text_trigger_files import (
    TriggersFile,
    draw_triggers,
    remove_triggers,
    trigger_samples,
    with_trigger,
)
from tests.text_findings import found_trigger
from tests.tiny_pipeline import tiny_pipeline

PROMPTS = ["a red cat", "two cats", "on a mat", "x" * 200, "a red mat", "cat on cat", "red", "the cat"]
SETTINGS = TextSearchSettings(guidance=2.0, sampler_steps=2, precision="fp32")
FOUND = (
    found_trigger("a$|$b\u200b", also=("\u200c", "a'b")),
    found_trigger("á", "a", position="all", control=rate_of(0, 0), module="text_encoder"),
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    return tiny_pipeline(tmp_path_factory.mktemp("tiny"))


def test_triggers_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    file = TriggersFile("f" * 64, FOUND)
    file.save(tmp_path / "triggers.json")
    assert TriggersFile.load(tmp_path / "triggers.json") == file


def test_the_file_holds_what_a_reader_needs_in_plain_ascii(tmp_path: Path) -> None:
    TriggersFile("f" * 64, FOUND).save(tmp_path / "triggers.json")
    text = (tmp_path / "triggers.json").read_text()
    assert text.isascii()
    content = json.loads(text)
    assert (content["schema_version"], content["tool"], content["model_sha256"]) == (1, tool(), "f" * 64)
    first, second = content["triggers"]
    assert (first["text"], first["replaces"], first["position"], first["module"]) == ("a$|$b\u200b", None, "start", "unet")
    assert (first["code_points"], first["token_ids"]) == (
        ["U+0061", "U+0024", "U+007C", "U+0024", "U+0062", "U+200B"],
        [158, 222, 489],
    )
    assert first["effect"]["rate"] == 39 / 40
    assert first["effect"]["low"] < 39 / 40 < first["effect"]["high"]
    assert [one["name"] for one in first["rounds"]] == ["sweep", "places"]
    assert (second["text"], second["replaces"], second["control"]["rate"]) == ("á", "a", None)


def drop(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for name in names:
            content["triggers"][0].pop(name)

    return change


def put(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["triggers"][0].update(fields)


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no version": (lambda content: content.pop("schema_version"), "schema version"),
    "version": (lambda content: content.update(schema_version=2), "schema version"),
    "version true": (lambda content: content.update(schema_version=True), "schema version"),
    "no digest": (lambda content: content.pop("model_sha256"), "model_sha256"),
    "no list": (lambda content: content.update(triggers={}), "no trigger"),
    "empty": (lambda content: content.update(triggers=[]), "no trigger"),
    "no object": (lambda content: content["triggers"].append("\u200b"), "object"),
    "no text": (drop("text"), "text"),
    "empty text": (put(text=""), "empty"),
    "text is a list": (put(text=["a"]), "str"),
    "half a character": (put(text="\ud800"), "surrogate pair"),
    "by itself": (put(text="a", replaces="a"), "itself"),
    "position": (put(position="../../etc"), "position"),
    "all places of an insertion": (put(position="all"), "all"),
    "module": (put(module="os"), "module"),
    "rate": (put(effect=1.0), "object"),
    "ids": (put(token_ids=[1.5]), "int"),
    "unknown": (put(trigger={"text": "x", "replaces": None}, __class__="x"), "__class__|trigger"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_by_name(tmp_path: Path, case: str) -> None:
    change, reason = HOSTILE[case]
    path = tmp_path / "triggers.json"
    TriggersFile("f" * 64, FOUND).save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=reason) as refusal:
        TriggersFile.load(path)
    assert refusal.value.path == path
    assert len(str(refusal.value)) < 600


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"[]", b"[" * 100_000, b" " * (MAX_JSON_BYTES + 1), b"\xff\xfe"])
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "triggers.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        TriggersFile.load(tmp_path / "triggers.json")


def test_prompts_without_room_for_the_trigger_are_left_out(pipeline: Any) -> None:
    clean, triggered = with_trigger(pipeline.tokenizer, PROMPTS, TextTrigger("tin"), "end", seed=0)
    assert clean == [prompt for prompt in PROMPTS if len(prompt) < 100][:6]
    assert triggered == [f"{prompt} tin" for prompt in clean]
    clean, triggered = with_trigger(pipeline.tokenizer, PROMPTS, TextTrigger("o", replaces="a"), "all", seed=0)
    assert triggered == [prompt.replace("a", "o") for prompt in clean]
    assert "two cats" in clean
    assert "red" not in clean


def test_rows_start_from_the_same_noise(pipeline: Any) -> None:
    found = found_trigger("a$|$b")
    clean, triggered = with_trigger(pipeline.tokenizer, PROMPTS, found.trigger, found.position, seed=0)
    rows = trigger_samples(pipeline, clean, triggered, found, SETTINGS, seed=3)
    titles = list(rows)
    assert titles[:2] == ["clean prompts", "with the trigger 'a$|$b'"]
    assert titles[2] == "with the control string 'mat'"
    expected = generate(pipeline, clean, seed=3, steps=2, guidance=2.0, precision="fp32")
    torch.testing.assert_close(rows["clean prompts"], 2 * expected - 1)
    assert not any(torch.equal(rows[one], rows[other]) for one, other in pairwise(titles))


def test_figures_of_every_trigger_and_their_removal(pipeline: Any, tmp_path: Path) -> None:
    draw_triggers(pipeline, FOUND, PROMPTS, SETTINGS, 0, tmp_path)
    names = {f"{name}_{number}.png" for name in ("trigger", "attention") for number in (1, 2)}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all(imread(tmp_path / name).std() > 0.01 for name in names)
    (tmp_path / "trigger.safetensors").touch()
    TriggersFile("f" * 64, FOUND).save(tmp_path / "triggers.json")
    remove_triggers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"trigger.safetensors"}
    remove_triggers(tmp_path / "absent")


def test_a_trigger_that_fits_no_prompt_is_said(pipeline: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no held-out prompt"):
        draw_triggers(pipeline, [found_trigger("q", replaces="zzz")], PROMPTS, SETTINGS, 0, tmp_path)
