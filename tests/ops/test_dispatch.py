"""The choice of implementation: explicit refusals, fallback, and what `doctor` is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from seal_fast.ops import backends, explain, gaussian_log_ratio
from seal_fast.ops.winograd_convolution import winograd_convolution_op
from tests.ops.compiled import needs_native


def ratio() -> torch.Tensor:
    return gaussian_log_ratio(torch.randn(3, 8), torch.zeros(2, 8), torch.ones(2, 8))


def run_without(module: str, code: str) -> Any:
    """What `code` prints as JSON in a fresh Python that cannot import this module."""
    ours = ("SEAL_FAST_BACKEND", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, "-c", f"import sys; sys.modules[{module!r}] = None\n{code}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


WITHOUT_NATIVE = """
import json, os, warnings
import torch
from seal_fast.ops import explain, gaussian_log_ratio

def ratio(backend):
    os.environ["SEAL_FAST_BACKEND"] = backend
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = gaussian_log_ratio(torch.randn(3, 8), torch.zeros(2, 8), torch.ones(2, 8))
    return {"value": value.tolist(), "warnings": [str(w.message) for w in caught]}

found = {"reference": ratio("reference"), "first": ratio("auto"), "second": ratio("auto")}
status = next(s for s in explain() if s.op == "gaussian_log_ratio" and s.device == "cpu")
found |= {"chosen": status.chosen, "refusals": status.refusals}
try:
    ratio("cpu")
except RuntimeError as error:
    found["error"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def without_native() -> dict[str, Any]:
    """What an installation without the compiled CPU extension does."""
    return run_without("seal_fast._native", WITHOUT_NATIVE)


@pytest.mark.parametrize(
    ("backend", "reason"),
    [("cuda", "needs tensors on cuda"), ("triton", "no triton implementation"), ("fastest", "must be one of")],
)
def test_an_explicit_backend_that_cannot_run_says_why(backend: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEAL_FAST_BACKEND", backend)
    with pytest.raises(RuntimeError, match=reason):
        ratio()


def test_an_explicit_cpu_backend_without_the_extension_raises(without_native: dict[str, Any]) -> None:
    assert "cpu cannot run gaussian_log_ratio: compiled extension missing" in without_native["error"]
    assert "seal_fast._native" in without_native["error"]
    assert "Unset SEAL_FAST_BACKEND" in without_native["error"]


def test_auto_falls_back_and_says_so_once(without_native: dict[str, Any]) -> None:
    first, second = without_native["first"], without_native["second"]
    torch.testing.assert_close(torch.tensor(first["value"]), torch.zeros(3, 2), rtol=0.0, atol=1e-6)
    (warning,) = first["warnings"]
    assert "slower torch reference (cpu: compiled extension missing" in warning
    assert second["warnings"] == []


def test_a_chosen_reference_is_silent(without_native: dict[str, Any]) -> None:
    assert without_native["reference"]["warnings"] == []


def test_explain_names_what_runs_and_why_not_the_faster_one(without_native: dict[str, Any]) -> None:
    assert without_native["chosen"] == "reference"
    assert "compiled extension missing" in without_native["refusals"]["cpu"]
    assert "cuda" in without_native["refusals"]


def test_explain_shows_a_backend_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEAL_FAST_BACKEND", "triton")
    assert all(s.chosen is None for s in explain() if s.op.startswith("gaussian"))


def test_a_missing_extension_keeps_its_cause() -> None:
    extension = backends.load("_no_such_extension")
    assert extension.module is None
    assert extension.reason is not None
    assert "_no_such_extension" in extension.reason
    assert extension.missing() == extension.reason


WITHOUT_TRITON = """
import json
from seal_fast.ops import backends, explain

status = next(s for s in explain() if s.op == "cross_attention" and s.device == "cpu")
print(json.dumps([backends.triton_missing("cross_attention"), status.refusals["triton"]]))
"""


def test_without_triton_its_kernels_say_what_is_missing() -> None:
    missing, refusal = run_without("triton", WITHOUT_TRITON)
    assert "Triton kernels missing" in missing
    assert "needs tensors on cuda" in refusal


@pytest.mark.skipif(not backends.INTERPRETED, reason="Triton compiles its kernels here")
def test_interpreted_kernels_run_only_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")

    def chosen() -> str | None:
        return next(s.chosen for s in explain() if s.op == "cross_attention" and s.device == "cpu")

    monkeypatch.setenv("SEAL_FAST_BACKEND", "auto")
    assert chosen() != "triton"
    monkeypatch.setenv("SEAL_FAST_BACKEND", "triton")
    assert chosen() == "triton"


@needs_native
def test_a_direct_call_skips_the_choice_unless_somebody_listens_to_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    op, arguments = winograd_convolution_op, (torch.rand(2, 16, 3, 5), torch.rand(36, 16, 32), None)
    expected = op(*arguments)
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.seal_fast.winograd_convolution: lambda *_, **__: 7}
    ) as counter:
        assert torch.equal(op.direct(*arguments), expected)
    assert counter.get_total_flops() == 7
    with profile() as recorded:
        op.direct(*arguments)
    assert "seal_fast::winograd_convolution" in {event.key for event in recorded.key_averages()}
    monkeypatch.setenv("SEAL_FAST_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="cannot run winograd_convolution"):
        op(*arguments)
    assert torch.equal(op.direct(*arguments), expected)
