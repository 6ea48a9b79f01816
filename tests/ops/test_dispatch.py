"""The choice of implementation: explicit refusals, fallback, and what `doctor` is told."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from seal_fast.ops import explain, gaussian_log_ratio, jit, native
from seal_fast.ops.gaussian import log_ratio_op
from seal_fast.ops.winograd_convolution import winograd_convolution_op

ABSENT = native.Extension("_native", None, "compiled extension missing: removed for this test")


def ratio() -> torch.Tensor:
    return gaussian_log_ratio(torch.randn(3, 8), torch.zeros(2, 8), torch.ones(2, 8))


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "CPU", ABSENT)
    monkeypatch.setattr(log_ratio_op, "_warned", set())


@pytest.mark.parametrize(
    ("backend", "reason"),
    [("cuda", "needs tensors on cuda"), ("triton", "no triton implementation"), ("fastest", "must be one of")],
)
def test_an_explicit_backend_that_cannot_run_says_why(backend: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEAL_FAST_BACKEND", backend)
    with pytest.raises(RuntimeError, match=reason):
        ratio()


def test_an_explicit_cpu_backend_without_the_extension_raises(no_native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEAL_FAST_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match=r"removed for this test.*Unset SEAL_FAST_BACKEND"):
        ratio()


def test_auto_falls_back_and_says_so_once(no_native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEAL_FAST_BACKEND", "auto")
    with pytest.warns(RuntimeWarning, match=r"slower torch reference.*removed for this test"):
        assert torch.allclose(ratio(), torch.zeros(3, 2), atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ratio()


def test_a_chosen_reference_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEAL_FAST_BACKEND", "reference")
    monkeypatch.setattr(log_ratio_op, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ratio()


def test_explain_names_what_runs_and_why_not_the_faster_one(no_native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEAL_FAST_BACKEND", raising=False)
    status = next(s for s in explain() if s.op == "gaussian_log_ratio" and s.device == "cpu")
    assert status.chosen == "reference"
    assert "removed for this test" in status.refusals["cpu"]
    assert "cuda" in status.refusals


def test_explain_shows_a_backend_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEAL_FAST_BACKEND", "triton")
    assert all(s.chosen is None for s in explain() if s.op.startswith("gaussian"))


def test_a_missing_extension_keeps_its_cause() -> None:
    extension = native.load("_no_such_extension")
    assert extension.module is None
    assert extension.reason is not None
    assert "_no_such_extension" in extension.reason


def test_without_triton_its_kernels_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    # as if it were not installed
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "seal_fast.kernels.cross_attention", raising=False)
    jit.missing.cache_clear()
    reason = jit.missing("cross_attention")
    jit.missing.cache_clear()
    assert reason is not None
    assert "triton" in reason
    cross_attention_status = next(s for s in explain() if s.op == "cross_attention" and s.device == "cpu")
    assert "needs tensors on cuda" in cross_attention_status.refusals["triton"]


@pytest.mark.skipif(native.CPU.module is None, reason=f"needs the compiled kernel: {native.CPU.reason}")
def test_a_direct_call_passes_the_dispatcher_unless_somebody_listens_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("went through torch's dispatcher")

    op, arguments = winograd_convolution_op, (torch.rand(2, 16, 3, 5), torch.rand(36, 16, 32), None)
    expected = op(*arguments)
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.seal_fast.winograd_convolution: lambda *_, **__: 7}
    ) as counter:
        assert torch.equal(op.direct(*arguments), expected)
    assert counter.get_total_flops() == 7
    with profile() as recorded:
        op.direct(*arguments)
    assert "seal_fast::winograd_convolution" in {row.key for row in recorded.key_averages()}
    monkeypatch.setattr(op, "_boundary", refuse)
    assert torch.equal(op.direct(*arguments), expected)
