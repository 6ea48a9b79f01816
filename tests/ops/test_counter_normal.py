"""counter_normal against Random123's known answers, an exact-arithmetic Box-Muller, and the normal distribution."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from seal_fast.ops import counter_normal, native
from seal_fast.ops.counter_normal import philox, reference_counter_normal, signed

SHAPES = [(1, 1), (3, 4), (5, 7), (2, 513), (4, 1030), (3, 20_001)]
"""Rows and dimensions: parts of a counter's four numbers, of a group of counters, of a chunk; the last for several threads."""

WITHIN = 2e-6
"""Of a kernel's float32 from the float64 reference: errors of logarithm, sine and cosine, for numbers to 6.8."""

needs_native = pytest.mark.skipif(native.CPU.module is None, reason=str(native.CPU.reason))


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFF_FFFFFFFF, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers(counter: tuple[int, int, int, int], seed: int, words: str) -> None:
    """kat_vectors of Random123 (Salmon et al., SC 2011)."""
    assert " ".join(f"{word:08x}" for word in philox(counter, seed).tolist()) == words
    assert philox(counter, signed(seed)).equal(philox(counter, seed))


def one_normal(seed: int, draw: int, row: int, dim: int) -> float:
    """One number at a time, from Python's own integers and mathematics."""
    c, key = [dim // 4, row, draw, 0], [seed % 2**32, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ key[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ key[1], p0 % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    r, s = c[dim % 4 // 2 * 2 : dim % 4 // 2 * 2 + 2]
    angle = 2 * math.pi * (s + 0.5) / 2**32
    return math.sqrt(-2 * math.log((r + 0.5) / 2**32)) * (math.sin(angle) if dim % 2 else math.cos(angle))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("rows", "dims"), SHAPES[:3])
def test_numbers_are_those_of_the_definition(rows: int, dims: int, dtype: torch.dtype, seed: int) -> None:
    got = counter_normal(torch.empty(rows, dims, dtype=dtype), seed, draw=5)
    want = torch.tensor([[one_normal(seed, 5, r, d) for d in range(dims)] for r in range(rows)], dtype=torch.float64)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=0, atol=WITHIN if dtype == torch.float32 else 1e-12)


@needs_native
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("rows", "dims"), SHAPES)
def test_every_instruction_set_fills_its_output(rows: int, dims: int, threads: int, seed: int) -> None:
    key = signed(seed)
    want = reference_counter_normal(torch.empty(rows, dims, dtype=torch.float64), seed, 1)
    for isa in range(len(native.CPU.module.isa_levels())):
        outs = [torch.full((rows, dims), torch.nan) for _ in range(2)]
        for out, used in zip(outs, (threads, 1), strict=True):
            native.CPU.module.counter_normal(out.data_ptr(), key, 1, rows, dims, used, isa)
        torch.testing.assert_close(outs[0].double(), want, rtol=0, atol=WITHIN)
        assert outs[0].equal(outs[1])


def test_noise_is_normal_and_independent(seed: int) -> None:
    like = torch.empty(8, 3, 40, 50)
    noises = [counter_normal(like, s, draw) for s, draw in ((seed, 0), (seed, 1), (seed ^ 1, 0), (seed ^ 1 << 40, 0))]
    for noise in noises:
        assert noise.shape == like.shape
        assert scipy.stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-7
        # neighbours, and the two numbers of one radius
        flat = noise.flatten().double()
        for lag in (1, 2, 3, 4, 6000):
            assert abs(float((flat[lag:] * flat[:-lag]).mean())) < 6 / math.sqrt(len(flat))
            assert abs(float((flat[lag:].square() * flat[:-lag].square()).mean()) - 1) < 6 * math.sqrt(8 / len(flat))
    table = torch.corrcoef(torch.stack([noise.flatten() for noise in noises]).double())
    assert float((table - torch.eye(len(noises))).abs().max()) < 6 / math.sqrt(like.numel())


def test_a_row_does_not_depend_on_its_company(seed: int) -> None:
    many = counter_normal(torch.empty(9, 3, 5, 7), seed)
    assert counter_normal(torch.empty(2, 3, 5, 7), seed).equal(many[:2])
    assert counter_normal(torch.empty(9, 3, 5, 7), seed).equal(many)
    # a longer row goes on where the shorter one ends
    assert counter_normal(torch.empty(9, 3 * 5 * 7 + 2), seed)[:, :-2].equal(many.flatten(1))
    assert counter_normal(torch.empty(0, 3, 5, 7), seed).shape == (0, 3, 5, 7)


def test_half_precision_is_rounded(seed: int) -> None:
    like = torch.empty(3, 10)
    for dtype in (torch.bfloat16, torch.float16):
        assert counter_normal(like.to(dtype), seed).equal(counter_normal(like, seed).to(dtype))


def test_registration() -> None:
    torch.library.opcheck(torch.ops.seal_fast.counter_normal.default, (torch.empty(3, 5), -7, 2))


@pytest.mark.parametrize(
    ("like", "seed", "draw", "message"),
    [
        (torch.empty(3, 5), -1, 0, "seed must be"),
        (torch.empty(3, 5), 2**64, 0, "seed must be"),
        (torch.empty(3, 5), 0, 2**32, "draw must be"),
        (torch.empty(5), 0, 0, "rows must be"),
        (torch.empty(3, 5, dtype=torch.int32), 0, 0, "rows must be"),
    ],
)
def test_bad_arguments_are_named(like: Tensor, seed: int, draw: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        counter_normal(like, seed, draw)


@pytest.mark.usefixtures("kernels_without_gpu")
def test_a_failed_cuda_launch_raises() -> None:
    with pytest.raises(RuntimeError, match="CUDA error"):
        native.CUDA.module.counter_normal(0, 0, 0, 1, 1, 0, 0)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("rows", "dims"), SHAPES)
def test_gpu_agrees(rows: int, dims: int, seed: int) -> None:
    want = reference_counter_normal(torch.empty(rows, dims, dtype=torch.float64), seed, 1)
    got = counter_normal(torch.empty(rows, dims, device="cuda"), seed, 1).cpu()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=WITHIN)
