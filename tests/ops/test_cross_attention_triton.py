"""The Triton kernels of cross_attention: on the GPU where there is one, else interpreted; what the compiler makes of them."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from seal_fast.ops import cross_attention
from seal_fast.ops.cross_attention import (
    backward_op,
    forward_op,
    reference_cross_attention,
    reference_cross_attention_backward,
)
from tests.ops.attention import assert_at_most_twice_the_error_of_plain, draw, plain, views, with_grads

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="a failed assertion on the GPU ends the process")

FLOAT = pytest.param(torch.float32, id="float32")
HALF = pytest.param(torch.float16, id="float16")
BFLOAT = pytest.param(
    torch.bfloat16,
    id="bfloat16",
    marks=pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter multiplies bfloat16 as if it were integers"),
)


def choose_tokens(choice: str, n: int, generator: torch.Generator) -> Tensor | None:
    few = torch.randint(n, (2,), generator=generator)
    chosen = {"few": few, "repeated": few[[0, 1, 0, 0]], "all": torch.randperm(n, generator=generator)}.get(choice)
    return None if chosen is None else chosen.to(DEVICE)


@pytest.fixture(autouse=True)
def only_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton or an error. Where Triton interprets the kernels, they take tensors on the CPU."""
    monkeypatch.setenv("SEAL_FAST_BACKEND", "triton")


@pytest.fixture(autouse=True)
def _poison() -> Any:
    """torch then fills what it allocates with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_fresh_memory_is_poisoned() -> None:
    assert torch.ones(3).new_empty(100).isnan().all()


# B, H, M, N, D: head sizes of Stable Diffusion and odd ones, all cuts of keys and dimensions, blocks that are cut off
@pytest.mark.parametrize(
    ("shape", "choice", "loss"),
    [
        ((1, 2, 70, 77, 40), "repeated", "both"),
        ((2, 1, 5, 100, 59), "few", "both"),
        ((1, 3, 17, 7, 64), "all", "maps"),
        ((1, 1, 9, 128, 80), "none", "both"),
        ((1, 2, 33, 1, 128), "repeated", "both"),
        ((1, 1, 18, 77, 160), "few", "out"),
        ((1, 1, 1, 1, 1), "none", "both"),
    ],
)
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT])
def test_error_is_at_most_twice_that_of_plain_torch(
    shape: tuple[int, ...], choice: str, loss: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    b, h, m, n, d = shape
    inputs = draw(generator, shape, dtype, DEVICE)
    tokens = choose_tokens(choice, n, generator)
    count = n if tokens is None else len(tokens)
    out_grad = torch.randn(b, h, m, d, generator=generator).to(DEVICE, dtype) if loss != "maps" else None
    maps_grad = torch.randn(b, count, m, generator=generator).to(DEVICE) if loss != "out" else None
    assert_at_most_twice_the_error_of_plain(cross_attention, inputs, tokens, out_grad, maps_grad)


def test_strided_inputs(generator: torch.Generator) -> None:
    shape = b, h, m, n, d = 1, 2, 5, 9, 20
    out_grad = torch.randn(b, m, h * d, generator=generator).view(b, m, h, d).transpose(1, 2).to(DEVICE)
    maps_grad = torch.randn(b, m, n, generator=generator).transpose(1, 2).to(DEVICE)
    for name, inputs in views(generator, shape, DEVICE).items():
        got = with_grads(cross_attention, inputs, None, (out_grad, maps_grad))
        want = with_grads(plain, [x.double() for x in inputs], None, (out_grad, maps_grad))
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_each_gradient_alone_and_each_loss_alone(generator: torch.Generator) -> None:
    b, h, m, n, d = shape = 1, 2, 5, 9, 20
    inputs, tokens = draw(generator, shape, device=DEVICE), choose_tokens("repeated", n, generator)
    losses = torch.randn(b, h, m, d, generator=generator).to(DEVICE), torch.randn(b, 4, m, generator=generator).to(DEVICE)
    for out_grad, maps_grad in (losses, (losses[0], None), (None, losses[1]), (None, None)):
        exact = [x.double() for x in inputs]
        exact_grads = [None if x is None else x.double() for x in (out_grad, maps_grad)]
        for needs in itertools.product((False, True), repeat=3):
            got = backward_op(*inputs, tokens, 0.3, out_grad, maps_grad, list(needs))
            if out_grad is None and maps_grad is None:
                want = [torch.zeros_like(x) if need else x.new_empty(0) for x, need in zip(inputs, needs, strict=True)]
            else:
                want = reference_cross_attention_backward(*exact, tokens, 0.3, *exact_grads, list(needs))
            for ours, theirs in zip(got, want, strict=True):
                torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("spoiler", [float("nan"), float("inf"), -float("inf")])
def test_spoiled_inputs_spoil_what_they_spoil_in_plain_torch(which: int, spoiler: float, generator: torch.Generator) -> None:
    inputs = draw(generator, (1, 2, 5, 9, 20), device=DEVICE)
    inputs[which][0, 1, 4, 3] = spoiler
    weights = torch.ones(1, 2, 5, 20, device=DEVICE), torch.ones(1, 9, 5, device=DEVICE)
    got, want = with_grads(cross_attention, inputs, None, weights), with_grads(plain, inputs, None, weights)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.isnan(), theirs.isnan())
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_slices_of_queries_add_up_and_repeat_exactly(slices: int, generator: torch.Generator) -> None:
    """However many there are, and however many blocks of queries each has."""
    b, h, m, n, d = shape = 1, 1, 50, 9, 20
    inputs, kernels = draw(generator, shape, device=DEVICE), import_module("seal_fast.kernels.cross_attention")
    weights = torch.randn(b, h, m, d, generator=generator).to(DEVICE), torch.randn(b, n, m, generator=generator).to(DEVICE)
    want = with_grads(plain, [x.double() for x in inputs], None, weights)[3:]

    def run() -> Tensor:
        sums = torch.full((2, slices, b, n, h, d), torch.nan, device=DEVICE)
        (launch,) = kernels.backward(*inputs, None, d**-0.5, *weights, None, *sums)
        blocks_of_slice = -(-m // (slices * launch.constants["BLOCK"]))
        arguments = {**launch.arguments, "ROWS": blocks_of_slice * launch.constants["BLOCK"]}
        replace(launch, grid=(slices, *launch.grid[1:]), arguments=arguments)()
        return sums

    sums = run()
    assert torch.equal(sums, run())
    for ours, theirs in zip(sums.sum(1).transpose(2, 3), want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_empty_results(generator: torch.Generator) -> None:
    for shape in ((0, 2, 5, 7, 4), (2, 2, 0, 7, 4)):
        inputs = [x.requires_grad_() for x in draw(generator, shape, device=DEVICE)]
        out, maps = cross_attention(*inputs)
        (out.sum() + maps.sum()).backward()
        assert all(x.grad is not None and not x.grad.any() for x in inputs)
    inputs = draw(generator, (1, 1, 5, 7, 4), device=DEVICE)
    out, maps = cross_attention(*inputs, torch.zeros(0, dtype=torch.int64, device=DEVICE))
    assert maps.shape == (1, 0, 5)
    torch.testing.assert_close(out, reference_cross_attention(*inputs, None, 0.5)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*slower torch reference.*:RuntimeWarning")
@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 1, 2, 129, 8), torch.float32, "up to 128 keys, not 129"),
        ((1, 1, 2, 3, 161), torch.float32, "up to 160 dimensions, not 161"),
        ((1, 1, 2, 3, 8), torch.float64, "no float64"),
    ],
)
def test_what_the_kernels_cannot_do_is_left_to_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, reason: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = draw(generator, shape, dtype, DEVICE)
    with pytest.raises(RuntimeError, match=reason):
        forward_op(*inputs, None, 0.5)
    with pytest.raises(RuntimeError, match=reason):
        backward_op(*inputs, None, 0.5, inputs[0], None, [True, True, True])
    monkeypatch.setenv("SEAL_FAST_BACKEND", "auto")
    assert forward_op.choose(*inputs, None, 0.5).backend != "triton"


@pytest.mark.usefixtures("gpu")
def test_triton_is_what_runs_on_a_gpu(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEAL_FAST_BACKEND", "auto")
    assert forward_op.choose(*draw(generator, (1, 1, 2, 3, 8), device=DEVICE), None, 0.5).backend == "triton"


@interpreted
@pytest.mark.parametrize("token", [-1, 7])
def test_a_token_that_is_not_a_key_fails_on_the_device(token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = import_module("triton.runtime.interpreter").interpreter_builder
    monkeypatch.setattr(builder, "options", replace(builder.options, debug=True))
    kernels = import_module("seal_fast.kernels.cross_attention")
    inputs, tokens = [torch.zeros(1, 1, 2, 4), *[torch.zeros(1, 1, 7, 4)] * 2], torch.tensor([0, token])
    link, _ = kernels.forward(*inputs, tokens, 0.5, torch.zeros(1, 1, 2, 4), torch.zeros(1, 2, 2))
    with pytest.raises(Exception, match="tokens must be keys"):
        link()


def run(code: list[str]) -> subprocess.CompletedProcess[str]:
    """A Python without the interpreter of kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *code], env=environment, capture_output=True, text=True)


ONE_KERNEL_FOR_ALL_SIZES = """
import torch
from benchmarks.triton_table import launches, signature
for dtype in (torch.float16, torch.float32):
    kinds = {
        (name, *signature(launch).items(), *launch.constants.items())
        for queries in (1, 16, 17, 4096) for chosen in (1, 2, 16, 77)
        for name, launch in launches(40, dtype, queries, chosen).items()
    }
    assert len(kinds) == 4, kinds
"""


def test_one_compiled_kernel_serves_all_sizes_and_tokens() -> None:
    done = run(["-c", ONE_KERNEL_FOR_ALL_SIZES])
    assert done.returncode == 0, done.stderr


OTHER_VARIANTS = """
import torch
from benchmarks.triton_table import compile_launch, launches, resources
for case in ({"chosen": None}, {"loss": "out"}, {"loss": "maps", "chosen": None}):
    for name, launch in launches(64, torch.bfloat16, **case).items():
        registers, stack = resources(compile_launch(launch, 90).asm["cubin"])
        assert stack == 0, (name, case, stack)
"""


def test_without_tokens_or_with_one_loss_the_kernels_compile_too() -> None:
    done = run(["-c", OTHER_VARIANTS])
    assert done.returncode == 0, done.stderr


def test_nothing_spills_that_did_not_when_the_table_was_made(generator: torch.Generator) -> None:
    """Three rows of half precision, drawn anew in every run: all of them take minutes."""
    half = [name for name in names() if "float16" in name]
    drawn = [half[i] for i in torch.randperm(len(half), generator=generator)[:3]]
    done = run(["-m", "benchmarks.triton_table", "--check", *drawn])
    assert done.returncode == 0, done.stderr


def names() -> list[str]:
    done = run(["-c", "from benchmarks.triton_table import names; print(*names())"])
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
