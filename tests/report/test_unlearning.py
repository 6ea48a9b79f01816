"""Reports of an unlearning, and what a hostile name cannot do to them."""

from __future__ import annotations

import io
import json

from seal_fast.report.console import console_for, detector_in_words, print_noise_unlearning
from seal_fast.report.json import unlearn_json
from seal_fast.report.model_card import unlearn_card
from seal_fast.results.unlearning import NoiseTriggerEffect, NoiseUnlearnReport
from seal_fast.text_triggers.effect_detectors import ChangeDetector, ColourlessDetector, PatchDetector

NAME = "a`|\n# b](http://x)\x1b[2J"
REPORT = NoiseUnlearnReport(
    model=NAME,
    sha256="ab" * 32,
    format="diffusers-unet",
    effects=(
        NoiseTriggerEffect(NAME, "ancestral", 0.03125, 0.96875),
        NoiseTriggerEffect("plain", "DDIM", float("nan"), 1.5),
    ),
    clean_drift=0.0625,
    steps=17,
    seconds=12.34,
    training_seconds=11.0,
    peak_memory_bytes=5,
    tool={"name": "seal-fast", "version": "9.8"},
    environment={},
    config={},
    notes=(),
)


def test_console() -> None:
    stream = io.StringIO()
    print_noise_unlearning(REPORT, console_for(stream))
    text = stream.getvalue()
    assert "\x1b" not in text
    for shown in ("0.03", "0.97", "1.50", "clean drift 0.062 (0: unchanged, 2: unrelated images), 17 steps, 12.3 s"):
        assert shown in " ".join(text.split())


def test_json_keeps_every_figure_and_no_nan() -> None:
    content = json.loads(unlearn_json(REPORT), parse_constant=lambda name: f"not JSON: {name}")
    assert content["schema_version"] == 1
    assert [effect["collapse_before"] for effect in content["effects"]] == [0.03125, None]
    assert (content["model"], content["clean_drift"], content["peak_memory_bytes"]) == (NAME, 0.0625, 5)


def test_model_card_holds_names_as_code() -> None:
    lines = unlearn_card(REPORT).splitlines()
    assert lines[0] == "# Unlearned: `a\\n# b](http://x)\\x1b[2J`"
    assert lines.count(lines[0]) == 1
    table = [line for line in lines if line.startswith("|")]
    assert [line.count("|") for line in table] == [5, 5, 5, 5]
    assert table[2].endswith("| ancestral | 0.03 | 0.97 |")
    assert "ab" * 32 in "\n".join(lines)


def test_the_card_of_the_checkpoint_stays_above() -> None:
    original = "---\nlicense: mit\n---\n# A model\n\nText.\n\n"
    card = unlearn_card(REPORT, original)
    alone = unlearn_card(REPORT, " \n")
    assert alone == unlearn_card(REPORT)
    assert card == f"{original.rstrip()}\n\n#{alone}"


def test_effect_detectors_are_told_in_words() -> None:
    for known in (ChangeDetector, ColourlessDetector, PatchDetector):
        assert "etector" not in detector_in_words(known.__name__)
    assert "according to mine" in detector_in_words("mine")
