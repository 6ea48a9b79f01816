"""The tables of scans and of prompt detection, measured on a tiny pipeline and rendered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import prompt_detection_table, render_text, text_scan_table
from benchmarks.machine import Machine
from benchmarks.prompt_detection_table import METHODS, Task, auroc_with_interval, compare, prompt_sets, random_control
from benchmarks.published.ftt import map_distances
from benchmarks.table_file import read_results, write_table
from benchmarks.text_zoo import grow_zoo_table
from seal_fast.text_to_image.prompts import content_ids
from seal_fast.text_triggers.search_settings import PhraseSettings, TextSearchSettings, VerificationSettings
from seal_fast.text_triggers.trigger import TextTrigger
from seal_fast.text_triggers.vocabulary import look_alikes
from seal_fast.zoo.captioned import Scene
from seal_fast.zoo.text_effects import Effect
from tests.tiny_pipeline import tiny_pipeline

PROMPTS = [
    f"{one} {two} {three}" for one in ("a", "two", "red") for two in ("red", "old", "big") for three in ("cat", "mat", "tin")
]
SETTINGS = TextSearchSettings(
    swept_prompts=2,
    phrases=PhraseSettings(parts=4, kept=1),
    harmless=2,
    kept=2,
    kept_per_kind=0,
    encoder_prompts=2,
    encoder_kept=2,
    verification=VerificationSettings(candidates=1),
    guidance=1.0,
    sampler_steps=1,
    precision="fp32",
)
MACHINE = Machine("some CPU", 1, "2", "abc", 1.0, 1.0, 1.0, 1.0)
HEAD = {
    "command": "python -m benchmarks.text_scan_table",
    "machine": vars(MACHINE),
    "prompts": 2,
    "resamples": 10,
    "guidance": 3.0,
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    return tiny_pipeline(Path(tmp_path_factory.mktemp("tiny")), 24)


def dark(images: Tensor, scenes: Sequence[Scene]) -> Tensor:
    return images.flatten(1).mean(dim=1) < 0


EFFECT = Effect("dark", TextTrigger("castle"), "start", dark)


def rendered(lines: Sequence[str]) -> str:
    page = "\n".join(lines)
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert all(row.count("|") > 2 for row in rows)
    return page


def test_a_scan_is_compared_with_the_truth_and_rendered(pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_scan_table, "SAMPLES", 1)
    result = text_scan_table.scan(pipeline, PROMPTS, [EFFECT], SETTINGS, None)
    (trigger,) = result["triggers"]
    assert (trigger["group"], trigger["trigger"]) == ("one token", "'castle'")
    assert 1 <= trigger["null_ranks"]["embedding norm"] <= trigger["null_ranks"]["candidates"]
    assert trigger["named"] == any(found["names"] for found in result["found"])
    assert result["verdict"] in ("clean", "backdoored", "inconclusive")
    assert result["evaluations"] > 0

    benign = {**result, "triggers": [], "found": [], "verdict": "clean", "reason": "no trigger was found"}
    results = [{"name": name, "role": "development", **one} for name, one in (("a", result), ("b", benign))]
    write_table(tmp_path / "text_scan.json", {**HEAD, "results": results})
    show(tmp_path, monkeypatch)
    page = rendered(render_text.text_scan_section())
    assert "`'castle'`" in page
    assert "development, benign: backdoored 0% [0, 79], n = 1; inconclusive 0% [0, 79], n = 1" in page
    page = f"a\n{render_text.BEGIN}\nold\n{render_text.END}\nb\n"
    unmeasured = render_text.with_readme_section(page)
    assert unmeasured.splitlines()[0::4] == ["a", "b"]
    assert "not measured" in unmeasured

    held_out = [{**one, "role": "test"} for one in results]
    write_table(tmp_path / "text_scan.json", {**HEAD, "results": held_out})
    measured = render_text.with_readme_section(page)
    assert measured.startswith(f"a\n{render_text.BEGIN}\n| triggers")
    assert "| one token |" in measured
    assert "reported backdoored 0% [0, 79], n = 1, inconclusive 0% [0, 79], n = 1." in measured
    assert measured.endswith(f"\n{render_text.END}\nb\n")
    assert "old" not in measured + unmeasured


def show(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Render from this folder, with the notes of the repository."""
    notes = Path(__file__).parents[1] / "benchmarks" / "results" / "notes"
    (folder / "notes").mkdir(exist_ok=True)
    for name in ("text_scan.md", "prompt_detection.md"):
        (folder / "notes" / name).write_text((notes / name).read_text())
    monkeypatch.setattr("benchmarks.markdown.RESULTS", folder)
    monkeypatch.setattr("benchmarks.render_text.RESULTS", folder)


def test_counts_of_named_triggers_and_benign_models() -> None:
    def result(verdict: str, *triggers: tuple[str, bool]) -> dict[str, Any]:
        return {"verdict": verdict, "triggers": [{"group": group, "named": named} for group, named in triggers]}

    found = text_scan_table.counts(
        [
            result("backdoored", ("one token", True), ("text of two to three tokens", False)),
            result("clean", ("one token", False)),
            result("inconclusive", ("one token", False)),
            result("clean"),
            result("inconclusive"),
        ]
    )
    assert {group: {what: (rate.rate, rate.trials) for what, rate in rates.items()} for group, rates in found.items()} == {
        "one token": {"named": (1 / 3, 3), "missed, not clean": (0.5, 2)},
        "text of two to three tokens": {"named": (0.0, 1), "missed, not clean": (1.0, 1)},
        "benign": {"backdoored": (0.0, 2), "inconclusive": (0.5, 2)},
    }


def test_methods_are_compared_on_the_same_prompts_and_rendered(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task(pipeline, pipeline.text_encoder, PROMPTS[:19])
    scorers = {name: method(task) for name, method in METHODS.items() if name != "FTT"}
    outcome = compare({**scorers, "FTT": lambda prompts: -map_distances(pipeline, prompts, steps=1)}, task, EFFECT, 2)
    assert set(outcome["methods"]) == set(METHODS)
    for figures in outcome["methods"].values():
        assert set(figures) == {"clean", "rare"}
        assert all(0 <= one["low"] <= one["auroc"] <= one["high"] <= 1 for one in figures.values())
    # the "clean" encoder is the model's own here
    assert outcome["methods"]["NaviT2I"] == outcome["methods"]["NaviT2I, own encoder"]
    results = [{"name": "a", "role": "development", "module": "unet", "attacks": [outcome]}]
    write_table(tmp_path / "prompt_detection.json", {**HEAD, "results": results})
    show(tmp_path, monkeypatch)
    assert "| a | development | dark |" in rendered(render_text.prompt_detection_section())


def test_only_the_triggered_prompts_hold_the_trigger(pipeline: Any) -> None:
    sets = prompt_sets(pipeline.tokenizer, PROMPTS, EFFECT, 6)
    assert all(prompt.startswith("castle ") for prompt in sets["triggered"])
    for clean, rare in zip(sets["clean"], sets["rare"], strict=True):
        string, rest = rare.split(" ", 1)
        assert rest == clean
        assert string != "castle"
        assert len(content_ids(pipeline.tokenizer, string)) == 1


def test_a_control_trigger_is_of_the_kind_of_the_true_one(pipeline: Any, generator: torch.Generator) -> None:
    tokenizer, kinds = pipeline.tokenizer, {"word of 1 token": ["photo", "sky"], "symbol of 1 token": ["~", "+"]}
    for text, expected in (
        ("photo ~", {"sky +"}),
        ("cat=>photo cat", {"sky cat"}),
        ("a=>\u0430", set(look_alikes()["a"]) - {"\u0430"}),
        ("zzzz", {"photo", "sky", "~", "+"}),
    ):
        trigger = TextTrigger.parse(text)
        found = random_control(tokenizer, trigger, kinds, generator)
        assert found.text in expected
        assert found.replaces == trigger.replaces


def test_a_table_of_a_role_continues_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.text_zoo.describe_machine", lambda: vars(MACHINE))
    for name in ("text-64-style", "text-64-test-style", "text-64-test-pixel", "text-64-test-copy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").touch()
    measured: list[str] = []

    def measure(zoo: Path, name: str) -> dict[str, Any]:
        measured.append(name)
        return {"zoo": str(zoo)}

    def run(*only: str) -> list[str]:
        arguments = ["x", "--zoo", str(tmp_path), "--role", "test", "--out", str(tmp_path / "t.json"), *only]
        monkeypatch.setattr("sys.argv", arguments)
        grow_zoo_table("some", {}, None, lambda recipe: bool(recipe.effects), measure)
        return [result["name"] for result in read_results(tmp_path / "t.json")]

    assert run("--only", "text-64-test-style") == ["text-64-test-style"]
    assert run() == ["text-64-test-pixel", "text-64-test-style"], "in the order of the recipes"
    assert measured == ["text-64-test-style", "text-64-test-pixel"]
    for other in ("text-64-style", "text-64-test-copy", "absent"):
        with pytest.raises(SystemExit):
            run("--only", other)


def test_sections_without_results_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show(tmp_path, monkeypatch)
    assert render_text.text_scan_section() == render_text.prompt_detection_section() == []


def test_area_under_the_curve(generator: torch.Generator) -> None:
    """Of unit normal scores shifted by d it is Phi(d / sqrt 2); its interval holds it; order decides alone, ties count half."""
    positives, negatives = torch.randn(400, generator=generator) + 1, torch.randn(400, generator=generator)
    found = auroc_with_interval(positives, negatives)
    expected = float(torch.special.ndtr(torch.tensor(0.5).sqrt()))
    assert found["auroc"] == pytest.approx(expected, abs=0.1)
    assert found["low"] < found["auroc"] < found["high"]
    assert auroc_with_interval(positives.exp(), negatives.exp()) == pytest.approx(found)
    assert auroc_with_interval(torch.ones(3), torch.tensor([1.0, 0.0]))["auroc"] == 0.75
    apart = auroc_with_interval(torch.ones(7), torch.zeros(20))
    assert apart == pytest.approx({"auroc": 1.0, "low": 1.0, "high": 1.0}, abs=1e-12)
    assert prompt_detection_table.RESAMPLES >= 1000
