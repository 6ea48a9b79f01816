"""The committed results of benchmarks: how they are written, what follows from them, and the pages that show them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import render_profile, render_results, render_text, text_scan_table
from benchmarks.accuracy_table import decide, summarise
from benchmarks.table_file import read_table
from seal_fast.noise_triggers import DEFAULT_PRESET
from seal_fast.text_triggers.search import MISSES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

BENCHMARK = """
import pytest

@pytest.mark.parametrize("call", [len])
@pytest.mark.parametrize("size", [1, 2])
def test_call(benchmark, size, call):
    benchmark.pedantic(call, ["x" * size], rounds=5)
    benchmark.extra_info.update(processor="some CPU", commit="abc", speedup=1.5)
"""


def test_a_benchmark_file_holds_quartiles_and_the_machine_once(tmp_path: Path) -> None:
    (tmp_path / "bench_call.py").write_text(BENCHMARK)
    out = tmp_path / "out.json"
    words = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.conftest", "bench_call.py", f"--benchmark-json={out}"]
    options = ["-o", "python_files=bench_*.py", "--rootdir", str(tmp_path)]
    # a worker of pytest-xdist tells its children to write no benchmark file
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(ROOT)
    subprocess.run([*words, *options], cwd=tmp_path, env=environment, check=True, capture_output=True)
    content = json.loads(out.read_text())
    assert content["machine"] == {"processor": "some CPU", "commit": "abc"}
    assert content["command"].startswith("python -m pytest -q")
    assert [result["parameters"] for result in content["results"]] == [{"size": 1}, {"size": 2}]
    for result in content["results"]:
        assert result["figures"] == {"speedup": 1.5}
        assert result["rounds"] == 5
        assert result["seconds"]["q1"] <= result["seconds"]["median"] <= result["seconds"]["q3"]


def test_a_scan_states_the_miss_rate_that_was_measured() -> None:
    assert read_table(RESULTS / "text_scan.json")["results"], "python -m benchmarks.text_scan_table makes it"
    assert text_scan_table.misses(read_table(RESULTS / "text_scan.json")["results"]) == MISSES


@pytest.mark.parametrize(("name", "preset"), [("accuracy", DEFAULT_PRESET), ("accuracy_published", "published")])
def test_committed_verdicts_follow_from_the_committed_evidence(name: str, preset: str) -> None:
    content = read_table(RESULTS / f"{name}.json")
    results = [dict(result) for result in content["results"]]
    decide(results, preset)
    for result, committed in zip(results, content["results"], strict=True):
        assert (result["name"], result["verdict"]) == (committed["name"], committed["verdict"])
        assert result["score"] == pytest.approx(committed["score"], rel=1e-5)
    summary = summarise(results, preset)
    assert summary.keys() == content["summary"].keys()
    for part in ("all", "held out", "hard"):
        for rate in ("tpr", "tnr"):
            assert summary[part][rate] == pytest.approx(content["summary"][part][rate])


def test_result_files_are_small_and_named_by_their_notes() -> None:
    files = list(RESULTS.rglob("*.*"))
    assert sum(file.stat().st_size for file in files) < 1.5e6
    # every other note is a part of a section, or of the page
    parts = {"introduction", "inputs", "attacks", "largest_batch", "profile_scans"}
    # measured later
    parts |= {name for name in ("text_scan", "prompt_detection") if not (RESULTS / f"{name}.json").exists()}
    notes = {file.stem for file in (RESULTS / "notes").glob("*.md")} - parts
    assert notes == {file.stem for file in RESULTS.glob("*.json")} - {"scans"}


def test_the_committed_pages_show_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = render_results.render_results()
    assert page == Path("docs/results.md").read_text()
    assert render_profile.render_profile() == Path("docs/profile.md").read_text()
    readme = Path("README.md").read_text()
    assert readme.count(render_text.BEGIN) == readme.count(render_text.END) == 1
    assert render_text.with_readme_section(readme) == readme
    shown = {part.split(")")[0] for part in page.split("(triggers/")[1:]}
    assert shown == {image.name for image in Path("docs/triggers").iterdir()}
