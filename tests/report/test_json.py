from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seal_fast.diffusion import ModelFamily
from seal_fast.noise_triggers import Evidence, NoiseScope, TriedCandidate
from seal_fast.report.json import detection_json, prompt_detection_json, report_json, to_json, write_report
from seal_fast.results.prompt_detection import PromptReport
from seal_fast.results.scan import ModelResult, ScanReport
from seal_fast.text_triggers.prompt_detection import PromptDetection, PromptVerdict
from seal_fast.verdict import Verdict

EVIDENCE = Evidence(M_r=0.25, V_r=0.5, mu_norm=1.5, gamma_mean=0.75, reversed_loss=1.0)
CANDIDATE = TriedCandidate("fixed-point", "ddpm", 1.2, 8, 0.5, "rejected", "The score is below reject_below.")
RESULT = ModelResult(
    path="a/b",
    detector="noise",
    sha256="f" * 64,
    format="diffusers-pipeline",
    family=ModelFamily("VP", "epsilon"),
    verdict=Verdict.CLEAN,
    rule="T3",
    score=0.5,
    threshold=3.0,
    reason="why",
    scope=NoiseScope(("reversed-loss",), (), (3, 8, 8)),
    evidence=EVIDENCE,
    trigger="a/b/trigger.safetensors",
    seconds=1.5,
    error=None,
    candidates=(CANDIDATE,),
)
REPORT = ScanReport((RESULT,), {"name": "seal-fast", "version": "1"}, {"torch": None}, {"seed": 0})

MODEL_KEYS = {
    "path",
    "detector",
    "sha256",
    "format",
    "family",
    "verdict",
    "rule",
    "score",
    "threshold",
    "reason",
    "scope",
    "found",
    "evidence",
    "trigger",
    "seconds",
    "error",
    "candidates",
    "notes",
    "config_sha256",
}


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_contract():
    content = strict(report_json(REPORT))
    assert list(content) == ["schema_version", "tool", "environment", "config", "models", "summary"]
    assert content["tool"] == {"name": "seal-fast", "version": "1"}
    assert content["summary"] == {"clean": 1, "backdoored": 0, "inconclusive": 0, "error": 0}
    (model,) = content["models"]
    assert set(model) == MODEL_KEYS
    assert model["verdict"] == "clean"
    assert model["rule"] == "T3"
    assert model["family"] == {"process": "VP", "prediction": "epsilon"}
    assert model["evidence"] == {
        "M_r": 0.25,
        "V_r": 0.5,
        "mu_norm": 1.5,
        "gamma_mean": 0.75,
        "reversed_loss": 1.0,
        "collapse": None,
        "clean_dispersion": None,
        "sampler": None,
    }
    assert model["candidates"] == [
        {
            "origin": "fixed-point",
            "sampler": "ddpm",
            "scale": 1.2,
            "samples": 8,
            "score": 0.5,
            "outcome": "rejected",
            "reason": "The score is below reject_below.",
        }
    ]
    assert model["scope"] == {"methods": ["reversed-loss"], "samplers": [], "shape": [3, 8, 8]}
    assert model["error"] is None
    assert model["score"] == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_json_does_not_have_become_null(value):
    result = replace(RESULT, score=value, evidence=replace(EVIDENCE, M_r=value), seconds=value)
    (read,) = strict(report_json(replace(REPORT, models=(result,))))["models"]
    assert read["score"] is read["evidence"]["M_r"] is read["seconds"] is None


LEAVES = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text()
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


def same(read, given):
    if isinstance(given, float):
        return read == given if math.isfinite(given) else read is None
    if isinstance(given, list):
        return len(read) == len(given) and all(map(same, read, given))
    if isinstance(given, dict):
        return read.keys() == given.keys() and all(same(read[key], given[key]) for key in given)
    return read == given and type(read) is type(given)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text(), TREES))
def test_everything_else_is_read_back_as_it_was(content):
    text = to_json(content)
    assert text.isascii()
    assert same(strict(text), content)


def test_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "report.json"
    write_report(REPORT, target)
    before = target.read_text()
    assert strict(before) == strict(report_json(REPORT))
    unwritable = replace(REPORT, config={"seed": object()})
    with pytest.raises(TypeError):
        write_report(unwritable, target)
    assert target.read_text() == before
    assert [path.name for path in target.parent.iterdir()] == ["report.json"]


def test_detection():
    content = strict(detection_json([1.5, -2.0, math.inf], {"name": "seal-fast", "version": "1"}))
    assert content["log_ratio"] == [1.5, -2.0, None]
    assert content["triggered"] == [True, False, True]
    assert content["summary"] == {"triggered": 2, "clean": 1}


def test_prompt_detection():
    found = (
        PromptDetection("c\u0430t", PromptVerdict.CLEAN, 3.5, math.inf, "\u0430", ("U+0430",), False),
        PromptDetection("mignneko cat", PromptVerdict.TRIGGERED, 3.5, 2.0, "mignneko", ("U+006D",), True),
        PromptDetection("cat", PromptVerdict.FAMILIAR, None, 2.0, "", (), False),
    )
    text = prompt_detection_json(PromptReport({"name": "seal-fast", "version": "1"}, 0.05, ("9 clean prompts",), found))
    assert text.isascii()
    content = strict(text)
    assert content["prompts"][0] == {
        "prompt": "c\u0430t",
        "verdict": "clean",
        "score": 3.5,
        "threshold": None,
        "part": "\u0430",
        "code_points": ["U+0430"],
        "cut": False,
    }
    assert [one["score"] for one in content["prompts"]] == [3.5, 3.5, None]
    assert content["summary"] == {"triggered": 1, "clean": 1, "familiar": 1}
    assert (content["false_alarm_rate"], content["notes"]) == (0.05, ["9 clean prompts"])
