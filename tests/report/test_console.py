from __future__ import annotations

import io
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from seal_fast.diffusion import ModelFamily
from seal_fast.noise_triggers import Calibration, CalibrationModel, Evidence, TerdSettings
from seal_fast.report.console import (
    console_for,
    duration,
    print_calibration,
    print_detection,
    print_plan,
    print_prompt_detection,
    print_report,
    safe,
)
from seal_fast.results.plan import PlannedSearch, PlannedStage, ScanPlan
from seal_fast.results.prompt_detection import PromptReport
from seal_fast.results.scan import ModelResult, ScanReport
from seal_fast.text_triggers.prompt_detection import PromptDetection, PromptVerdict
from seal_fast.text_triggers.rate import rate_of
from seal_fast.verdict import Decision, Verdict
from tests.text_findings import found_trigger

RESULT = ModelResult(
    path="models/" + "a-rather-long-name-" * 4,
    detector="noise",
    sha256="f" * 64,
    format="diffusers-pipeline",
    family=ModelFamily("VP", "epsilon"),
    verdict=Verdict.BACKDOORED,
    rule="V3",
    score=123456.78,
    threshold=3.0,
    reason="with the trigger found, samples vary 123456.8 times less than without it, which no benign model reached",
    scope=None,
    evidence=None,
    trigger=None,
    seconds=1234.5,
    error=None,
)


def printed(results, width=80, **options):
    stream = io.StringIO()
    console = Console(file=stream, width=width, highlight=False, markup=False, emoji=False, **options)
    print_report(ScanReport(tuple(results), {}, {}, {}), console)
    return stream.getvalue()


def name_and_reason(text):
    """The folded texts of the only model of a report, put together again: its name, and the sentence below."""
    header, _, first, *rest = text.splitlines()[:-1]
    start = header.index("model")
    name = first[start:].split("  ")[0].strip()
    for number, line in enumerate(rest):
        if line.startswith(" " * (start + 1)):
            return name, " ".join(line.strip() for line in rest[number:])
        name += line.strip()
    raise AssertionError("no reason")


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("verdict", list(Verdict))
def test_nothing_is_cut_or_broken(verdict, width):
    text = printed([replace(RESULT, verdict=verdict)], width)
    assert max(map(len, text.splitlines())) <= width
    first = text.splitlines()[2]
    assert first.split()[0] == verdict.value
    assert first.endswith("1.23e+05 / 3.00   1234.5")
    assert name_and_reason(text) == (RESULT.path, RESULT.reason)


WORDS = st.text("abcdefghijklmnopqrstuvwxyzABC0123456789,.:'/-_", min_size=1, max_size=24)


@settings(deadline=None, max_examples=50)
@given(
    names=st.lists(WORDS, min_size=1, max_size=12).map("/".join),
    words=st.lists(WORDS, min_size=1, max_size=40),
    verdict=st.sampled_from(Verdict),
    score=st.none() | st.floats(-1e12, 1e12),
    seconds=st.floats(0, 99999),
    width=st.sampled_from([80, 100]),
)
def test_every_line_fits_and_no_word_of_the_sentence_is_broken(names, words, verdict, score, seconds, width):
    result = replace(RESULT, path=names, reason=" ".join(words), verdict=verdict, score=score, seconds=seconds)
    text = printed([result], width)
    assert max(map(len, text.splitlines())) <= width
    name, reason = name_and_reason(text)
    assert name == names
    assert reason == " ".join(words)


def test_a_name_that_cannot_be_folded_keeps_its_ends():
    name = "start" + "x" * 200 + "end.safetensors"
    text = printed([replace(RESULT, path=name)])
    assert max(map(len, text.splitlines())) <= 80
    shown = name_and_reason(text)[0]
    head, _, tail = shown.partition("...")
    assert name.startswith(head)
    assert name.endswith(tail)
    assert len(head) > 10 < len(tail)


def test_every_text_trigger_has_a_line_and_what_else_activates_it_another():
    found = found_trigger(also=("\u200c", "zero\x1b[2J"))
    swap = found_trigger("\u0430", "a", position="all", module="text_encoder", effect=rate_of(40, 40), control=rate_of(0, 0))
    text = printed([replace(RESULT, detector="text", found=(found, swap), reason="why")], width=200)
    lines = [line.strip() for line in text.splitlines()]
    assert lines[lines.index("why") + 1 : lines.index("why") + 4] == [
        "'\\u200b' (U+200B) at the start: changes 98% [87, 100] of images, control strings 2% [1, 9]; unet",
        "also activated by '\\u200c', 'zero\\x1b[2J'",
        "'a' => '\u0430' (U+0430) everywhere: changes 100% [91, 100] of images, control strings -; text encoder",
    ]
    assert "\x1b" not in text
    many = found_trigger("a" * 20, code_points=(), also=tuple("abcdefghijkl"))
    text = printed([replace(RESULT, found=(many,))], width=200)
    assert "U+" not in text
    assert "'h' and 4 more" in text
    assert "'i'" not in text


@pytest.mark.parametrize("width", [60, 80])
def test_a_plan_fits_the_console(width):
    searches = (
        PlannedSearch("models/" + "a-rather-long-name-" * 3, (PlannedStage("sweep", 54_000),), 54_000, 5400.0, 8, 0.8),
        PlannedSearch("broken\x1b", error="no unet"),
    )
    stream = io.StringIO()
    print_plan(ScanPlan(searches, 2, {}), Console(file=stream, width=width, highlight=False, markup=False, emoji=False))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert text.splitlines()[2].split()[-3:] == ["54,000", "90.0", "min"]
    assert "at most: sweep 54,000" in text
    assert "no unet" in text
    assert "2 other models" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(("seconds", "text"), [(None, "-"), (119.0, "119.0 s"), (120.0, "2.0 min"), (7200.0, "2.0 h")])
def test_a_time_in_its_unit(seconds, text):
    assert duration(seconds) == text


def test_counts_close_it():
    results = [replace(RESULT, verdict=verdict) for verdict in (Verdict.CLEAN, Verdict.CLEAN, Verdict.ERROR)]
    assert printed(results).splitlines()[-1] == "3 models: 2 clean, 0 backdoored, 0 inconclusive, 1 error"


def test_markup_in_a_name_is_only_a_name():
    text = printed([replace(RESULT, path="[red]x[/red] :boom:", reason="[bold]")])
    assert "[red]x[/red] :boom:" in text
    assert "[bold]" in text


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.text())
def test_no_name_can_steer_the_terminal(name):
    plain = safe(name).plain
    assert plain.isprintable()
    assert "".join(c for c in name if c.isprintable()) in plain or not name.isprintable()
    if name.isprintable():
        assert plain == name


def test_colour_only_where_it_is_wanted(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in printed([RESULT], force_terminal=True, color_system="standard")
    assert "\x1b[" not in printed([RESULT])
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31m" not in printed([RESULT], force_terminal=True, color_system="standard")


def test_a_stream_that_is_no_terminal_gets_plain_text():
    stream = io.StringIO()
    print_report(ScanReport((RESULT,), {}, {}, {}), console_for(stream))
    assert "\x1b" not in stream.getvalue()


def test_detection_counts():
    stream = io.StringIO()
    print_detection([3.25, -1.0, 0.0], console_for(stream))
    lines = stream.getvalue().splitlines()
    assert [line.split() for line in lines[2:5]] == [
        ["triggered", "0", "3.25"],
        ["clean", "1", "-1.00"],
        ["clean", "2", "0.00"],
    ]
    assert lines[-1] == "3 inputs: 1 triggered, 2 clean"


def test_prompt_detection_shows_what_the_terminal_cannot_print():
    stream = io.StringIO()
    found = (
        PromptDetection("\u200b cat \x1b[31m", PromptVerdict.TRIGGERED, 3.5, 2.0, "\u200b", ("U+200B",), True),
        PromptDetection("a fine cat", PromptVerdict.CLEAN, 0.5, 2.0, "fine", ("U+0066",), False),
        PromptDetection("cat", PromptVerdict.FAMILIAR, None, 2.0, "", (), False),
    )
    print_prompt_detection(PromptReport({}, 0.05, (), found), console_for(stream))
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "\u200b" not in text
    lines = text.splitlines()
    assert lines[2].split() == ["triggered", "\\u200b", "cat", "\\x1b[31m", "3.50", "/", "2.00"]
    assert lines[3].strip() == "suspected: '\\u200b' (U+200B)"
    assert lines[4].strip() == "the model reads only the beginning"
    assert lines[5].split() == ["clean", "a", "fine", "cat", "0.50", "/", "2.00"]
    assert lines[6].split() == ["familiar", "cat", "-"]
    assert "3 prompts: 1 triggered, 1 clean, 1 familiar (5% of harmless prompts may count as triggered)" in " ".join(lines)
    assert "familiar: clean prompts hold all words and pairs of words, so nothing was measured" in " ".join(lines)


def test_calibration_lists_every_model_under_the_limits_of_its_family():
    models = [
        CalibrationModel(
            name=f"{family}/" + "a-rather-long-name-" * 3 + str(value),
            sha256="f" * 64,
            family=family,
            shape=(3, 8, 8),
            backdoored=False,
            evidence=Evidence(M_r=value, V_r=value, mu_norm=1.5, gamma_mean=0.75, reversed_loss=1.0),
        )
        for family in (ModelFamily("VP", "epsilon"), ModelFamily("VE", "score"))
        for value in (0.25, 0.5, 0.75)
    ]
    calibration = Calibration(TerdSettings(), tuple(models))
    stream = io.StringIO()
    left_out = [(model, Decision(Verdict.INCONCLUSIVE, None, None, "V1", "")) for model in models[1:]]
    print_calibration(calibration, left_out, console_for(stream))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    heads = [number for number, line in enumerate(lines) if "a model is backdoored if M_r exceeds" in line]
    assert [lines[number].split(":")[0] for number in heads] == ["VP epsilon 3x8x8", "VE score 3x8x8"]
    values = [(line.split()[-4:]) for line in lines if "benign " in line and "leave" not in line]
    assert values == [
        ["benign", value, value, verdict]
        for family in range(2)
        for value, verdict in (
            ("0.2500", "inconclusive" if family else "-"),
            ("0.5000", "inconclusive"),
            ("0.7500", "inconclusive"),
        )
    ]
