"""Spoilt files and odd terminals around a scan: each costs one message that cannot control the terminal."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text
from typer.testing import CliRunner

from seal_fast.checkpoints import CheckpointError
from seal_fast.cli import app
from seal_fast.report.console import console_for
from seal_fast.workflows.discovery import Checkpoint
from seal_fast.workflows.noise_scan import NoiseScan
from seal_fast.workflows.resume import resumed_results
from seal_fast.workflows.scan import scan

ESCAPES = "\x1b]0;owned\x07\n\u202e"


def invoke(*args: object, **env: str) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], env=env)


def test_a_reason_is_one_short_line_that_controls_no_terminal() -> None:
    error = CheckpointError("model", ESCAPES * 1000)
    assert error.reason.isprintable()
    assert len(error.reason) == 1000
    assert str(error) == f"model: {error.reason}"


@pytest.mark.parametrize(
    "arguments",
    [
        ("scan", f"absent {ESCAPES}"),
        ("scan", ".", "--preset", ESCAPES),
        ("scan", ".", "--budget", ESCAPES),
        ("unlearn", ".", "--out", "out", "--trigger", "x", "--detector", f"patch={ESCAPES}"),
        ("detect", ".", f"absent {ESCAPES}"),
    ],
    ids=lambda arguments: " ".join(arguments[:3:2]),
)
def test_a_usage_error_controls_no_terminal(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 4
    assert "owned" in result.stderr
    assert all(line.isprintable() for line in result.stderr.split("\n"))
    assert "\u202e" not in result.stderr


def test_a_file_that_is_no_calibration_controls_no_terminal(tmp_path: Path) -> None:
    file = tmp_path / "pool.json"
    file.write_text(json.dumps({"schema_version": ESCAPES}))
    result = invoke("scan", tmp_path, "--calibration", file)
    assert result.exit_code == 4
    assert "owned" in result.stderr
    assert all(line.isprintable() for line in result.stderr.split("\n"))


@pytest.mark.parametrize("seed", [-1, 10**30])
@pytest.mark.parametrize("command", ["scan", "unlearn", "detect", "calibrate"])
def test_a_seed_that_torch_does_not_take_is_a_usage_error(command: str, seed: int, tmp_path: Path) -> None:
    result = invoke(command, tmp_path, *([tmp_path] if command == "detect" else []), "--seed", seed)
    assert result.exit_code == 4
    assert "--seed" in result.stderr


def nested(result: dict[str, Any]) -> str:
    return "[" * 200_000


def trigger(value: object) -> Any:
    return lambda report: json.dumps({**report, "models": [{**one, "trigger": value} for one in report["models"]]})


SPOILT = {
    "nested": nested,
    "a number for a path": trigger(5),
    "a path too long": trigger("a" * 100_000),
    "a path with a null": trigger("a\0b"),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT.keys())
def test_a_spoilt_report_resumes_nothing(spoil: Any, quiet_model: Path, calibration: Any, tmp_path: Path) -> None:
    report = scan(quiet_model, calibration=calibration, out=tmp_path)
    file = tmp_path / "report.json"

    def resumed() -> dict[int, Any]:
        found = [Checkpoint(Path(quiet_model).resolve(), report.models[0].path)]
        return resumed_results(tmp_path, found, [NoiseScan(calibration)], report.tool, report.config)

    assert list(resumed()) == [0]
    file.write_text(spoil(json.loads(file.read_text())))
    assert resumed() == {}


def test_a_report_that_is_a_fifo_resumes_nothing(calibration: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "report.json")
    assert resumed_results(tmp_path, [], [NoiseScan(calibration)], {}, {}) == {}


def test_a_terminal_of_unknown_width_shows_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    stream = io.StringIO()
    console_for(stream).print(Text("clean"))
    assert stream.getvalue() == "clean\n"


def test_a_preset_without_a_shipped_calibration_says_how_to_make_one(tmp_path: Path) -> None:
    result = invoke("scan", tmp_path, "--preset", "published")
    assert result.exit_code == 4
    assert "seal-fast calibrate --preset published" in " ".join(result.stderr.split())
