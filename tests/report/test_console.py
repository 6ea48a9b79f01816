from __future__ import annotations

import io
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from seal_fast.diffusion import ModelFamily
from seal_fast.noise_triggers import Verdict
from seal_fast.report.console import console_for, print_detection, print_report, safe
from seal_fast.results.scan import ModelResult, ScanReport

ROW = ModelResult(
    "models/" + "a-rather-long-name-" * 4,
    "f" * 64,
    "diffusers-pipeline",
    ModelFamily("VP", "epsilon"),
    Verdict.BACKDOORED,
    "T1",
    123456.78,
    3.0,
    "M_r lies +123456.8 standard deviations from the mean of 10 benign models",
    None,
    None,
    1234.5,
    None,
)


def printed(rows, width=80, **options):
    stream = io.StringIO()
    console = Console(file=stream, width=width, highlight=False, markup=False, emoji=False, **options)
    print_report(ScanReport(tuple(rows), {}, {}, {}), console)
    return stream.getvalue()


@pytest.mark.parametrize("verdict", list(Verdict))
def test_nothing_is_cut_at_80_columns(verdict):
    text = printed([replace(ROW, verdict=verdict)])
    assert verdict.value in text
    assert "T1" in text
    assert "1.23e+05 / 3.00" in text
    assert "1234.5" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    # folded over lines, but every letter is there
    first_column = "".join(line[: text.splitlines()[0].index("format")].strip() for line in text.splitlines()[2:-1])
    assert ROW.path in first_column


def test_counts_close_it():
    rows = [replace(ROW, verdict=verdict) for verdict in (Verdict.CLEAN, Verdict.CLEAN, Verdict.ERROR)]
    assert printed(rows).splitlines()[-1] == "3 models: 2 clean, 0 backdoored, 0 inconclusive, 1 error"


def test_markup_in_a_name_is_only_a_name():
    text = printed([replace(ROW, path="[red]x[/red]", reason="[bold]", format=":boom:")], width=120)
    assert "[red]x[/red]" in text
    assert "[bold]" in text
    assert ":boom:" in text


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
    assert "\x1b[" in printed([ROW], force_terminal=True, color_system="standard")
    assert "\x1b[" not in printed([ROW])
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31m" not in printed([ROW], force_terminal=True, color_system="standard")


def test_a_stream_that_is_no_terminal_gets_plain_text():
    stream = io.StringIO()
    print_report(ScanReport((ROW,), {}, {}, {}), console_for(stream))
    assert "\x1b" not in stream.getvalue()


def test_detection_counts():
    stream = io.StringIO()
    print_detection([3.25, -1.0, 0.0], console_for(stream))
    lines = stream.getvalue().splitlines()
    assert [line.split() for line in lines[2:5]] == [
        ["0", "3.25", "triggered"],
        ["1", "-1.00", "clean"],
        ["2", "0.00", "clean"],
    ]
    assert lines[-1] == "3 inputs: 1 triggered, 2 clean"
