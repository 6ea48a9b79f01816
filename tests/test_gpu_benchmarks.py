"""The GPU benchmarks at sizes that only prove that they run, and the report of their results."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from benchmarks.gpu import device, every_kernel, report, requirements, stages, train_zoo
from benchmarks.gpu.device import TINY, Limits

ROOT = Path(__file__).parents[1]


def results_of(stage: str, folder: Path) -> list[dict[str, Any]]:
    stages.run(stage, TINY, folder)
    return json.loads((folder / f"{stage}.json").read_text())


def test_limits_are_measured() -> None:
    limits = device.measure_limits(TINY)
    assert min(limits.bandwidth, *limits.gemm.values()) > 0


def test_every_op_is_compared_with_its_baseline(tmp_path: Path) -> None:
    limits = Limits(1e12, dict.fromkeys(device.DTYPES, 1e12))
    (tmp_path / "device.json").write_text(json.dumps([{"limits": asdict(limits)}]))
    found = results_of("ops", tmp_path)
    assert {result["op"] for result in found} == {
        "cross_attention",
        "gaussian_kl_stats",
        "gaussian_log_ratio",
        "reversed_loss",
        "sampler_step",
    }
    for result in found:
        assert result["speedups"][result["baseline"]] == result["seconds"][result["baseline"]] / result["seconds"]["seal_fast"]


def test_reversions_and_several_models_at_once(tmp_path: Path) -> None:
    found = results_of("reversion", tmp_path)
    assert [result["stage"] for result in found] == ["estimation", "refinement", "sampling", "descent"]
    assert all(result["failed"] == {} for result in found)
    for result in found[:2]:
        assert result["extrapolated_seconds"].keys() == result["seconds_per_iteration"].keys()
        assert result["speedups"]["published_float32"] == 1
    for result in results_of("models", tmp_path):
        assert result["failed"] == {}
        assert result["speedups"].keys() == {"one_after_another", "threads_and_streams"}


def test_unlearning_and_a_scan(tmp_path: Path) -> None:
    found = results_of("unlearning", tmp_path)
    assert [result["batch"] for result in found] == [1, 1, 1, 2]
    assert found[0]["speedup"] == 1
    (result,) = results_of("scan", tmp_path)
    assert result["error"] is None


def test_every_kernel_is_launched(capsys: pytest.CaptureFixture[str]) -> None:
    every_kernel.main(every_kernel.SIZES[:2])
    assert "every kernel was launched" in capsys.readouterr().out


def test_the_report_names_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "stages.tsv").write_text("install\tok\t3\t\nops\ttimed out\t9\tlimit 9 s\n")
    (tmp_path / "device.json").write_text(json.dumps([{"device": "some GPU", "commit": "unknown"}]))
    lost = {"models": 4, "seconds_per_iteration": {}, "speedups": {}, "failed": {"threads_and_streams": "no room"}}
    (tmp_path / "models.json").write_text(json.dumps([lost]))
    with pytest.raises(SystemExit) as ended:
        report.main(["--parts", str(tmp_path), "--out", str(tmp_path / "r.json"), "--commit", "abc"])
    assert ended.value.code == 1
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["device"]["commit"] == "abc"
    assert results["stages"]["ops"]["status"] == "timed out"
    printed = capsys.readouterr().out
    assert "stage ops: timed out, 9 s: limit 9 s" in printed
    assert "4 threads_and_streams: no room" in printed


def test_missing_requirements_are_named() -> None:
    assert requirements.missing(Requirement("torch"), set()) == []
    assert requirements.missing(Requirement("no-such-thing>=2"), set()) == ["no-such-thing>=2"]
    assert "there is" in requirements.missing(Requirement("numpy<1"), set())[0]
    # through what another one requires
    assert requirements.missing(Requirement("diffusers"), set()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [([], 4, "usage"), (["--out", "x", "--wheels", "/nowhere"], 4, "no wheels"), (["--out", "x"], 2, "sees no CUDA device")],
)
def test_a_run_that_cannot_start_says_why(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    if code == 2 and torch.cuda.is_available():
        pytest.skip("there is a GPU: the run would start")
    done = subprocess.run([ROOT / "benchmarks/gpu/run.sh", *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code
    assert message in done.stderr


def test_models_are_trained_measured_and_scanned(tmp_path: Path) -> None:
    plan = train_zoo.TINY
    with pytest.raises(SystemExit, match="train that first"):
        train_zoo.run(plan, tmp_path, ["gpu-8-troj"], keep_models=False)
    train_zoo.run(plan, tmp_path, ["gpu-8"], keep_models=False)
    assert (tmp_path / "gpu-8").exists()
    train_zoo.run(plan, tmp_path, ["gpu-8", "gpu-8-bad"], keep_models=False)
    found = json.loads((tmp_path / "train_zoo.json").read_text())
    assert [result["name"] for result in found] == ["gpu-8", "gpu-8-bad"]
    for result in found:
        assert math.isfinite(result["final_loss"])
        assert result["evidence"] is not None
        assert (result["quality"]["attack_success"] is None) == (result["method"] is None)
    # gpu-8 stays: another model is still to be trained from it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-8", "train_zoo.json"]
