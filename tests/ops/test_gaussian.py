"""gaussian_kl_stats and gaussian_log_ratio against closed forms of scipy, in float64."""

from __future__ import annotations

import shutil

import pytest
import scipy.stats
import torch
from torch import Tensor

from seal_fast.ops import GAMMA_FLOOR, gaussian_kl_stats, gaussian_log_ratio, standardise, standardised_log_ratio
from seal_fast.ops.backends import CUDA
from seal_fast.ops.gaussian import kl_stats_op, log_ratio_op, reference_gaussian_kl_stats
from tests.ops.compiled import LEVELS, MODULE, addresses, needs_native

SHAPES = [
    (1, 1, (1,)),
    (5, 3, (7,)),
    (1, 17, (63,)),
    (5, 1, (257,)),
    (33, 17, (3, 17, 5)),
    (70, 4, (3, 16, 16)),
    (9, 2, (3, 40, 40)),
    (3, 1, (3, 61, 67)),
]
RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-12}


def draw(
    generator: torch.Generator, n: int, k: int, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    mu = 0.5 * torch.randn(k, *shape, generator=generator, dtype=torch.float64)
    gamma = 0.1 + 1.4 * torch.rand(k, *shape, generator=generator, dtype=torch.float64)
    return x.to(dtype), mu.to(dtype), gamma.to(dtype)


def scipy_log_ratio(x: Tensor, mu: Tensor, gamma: Tensor) -> Tensor:
    x, mu, gamma = (t.double().flatten(1) for t in (x, mu, gamma))
    triggered = scipy.stats.norm.logpdf(x[:, None].numpy(), mu[None].numpy(), gamma[None].numpy())
    clean = scipy.stats.norm.logpdf(x[:, None].numpy())
    return torch.from_numpy((triggered - clean).sum(-1))


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "k", "shape"), SHAPES)
def test_log_ratio_is_the_difference_of_log_densities(
    n: int,
    k: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    backend: str,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SEAL_FAST_BACKEND", backend)
    x, mu, gamma = draw(generator, n, k, shape, dtype)
    got, want = gaussian_log_ratio(x, mu, gamma), scipy_log_ratio(x, mu, gamma)
    assert got.shape == (n, k)
    assert got.dtype == dtype
    # the terms of the sum, not their possibly small total, set the scale of rounding
    z = (x.double().flatten(1)[:, None] - mu.double().flatten(1)) / gamma.double().flatten(1)
    size = (x.double().flatten(1).square().sum(1, keepdim=True) + z.square().sum(2)) / 2 + gamma.log().abs().flatten(1).sum(1)
    assert float(((got.double() - want).abs() / size).max()) < RELATIVE[dtype] / 5


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "k", "shape"), SHAPES)
def test_kl_stats_are_moments_of_the_divergence(
    n: int,
    k: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    backend: str,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SEAL_FAST_BACKEND", backend)
    _, mu, gamma = draw(generator, n, k, shape, dtype)
    stats = gaussian_kl_stats(mu, gamma)
    p = torch.distributions.Normal(mu.double().flatten(1), gamma.double().flatten(1))
    kl = torch.distributions.kl_divergence(p, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(stats.mean, kl.mean(1), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(stats.variance, kl.var(1, correction=0), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(stats.squared_norm, mu.double().flatten(1).square().sum(1), rtol=1e-12, atol=0.0)


def test_weak_shift_at_the_size_of_an_image_keeps_its_precision_in_float32(generator: torch.Generator) -> None:
    """gamma = 1 and ||mu|| = 2: the ratio is five orders below the sums of squares it comes from."""
    d = 3 * 64 * 64
    mu = torch.randn(2, d, generator=generator)
    mu = 2 * mu / mu.norm(dim=1, keepdim=True)
    x = torch.randn(6, d, generator=generator)
    want = x.double() @ mu.double().T - mu.double().square().sum(1) / 2
    assert float((gaussian_log_ratio(x, mu, torch.ones_like(mu)).double() - want).abs().max()) < 5e-3


def test_small_gamma_is_not_cancelled_away(generator: torch.Generator) -> None:
    """Inputs of the trigger's own distribution: an expanded square would lose 1/gamma^2 = 1e6 in precision."""
    mu = torch.rand(1, 500, generator=generator) + 0.5
    gamma = torch.full_like(mu, GAMMA_FLOOR)
    x = mu + gamma * torch.randn(8, 500, generator=generator)
    assert relative_error(gaussian_log_ratio(x, mu, gamma), scipy_log_ratio(x, mu, gamma)) < 1e-5


def test_gamma_below_the_floor_counts_as_the_floor(generator: torch.Generator) -> None:
    x, mu, gamma = draw(generator, 3, 2, (3, 5, 5), torch.float64)
    holed, floored = gamma.clone(), gamma.clone()
    holed[:, 0], floored[:, 0] = 0.0, GAMMA_FLOOR
    assert torch.equal(gaussian_log_ratio(x, mu, holed), gaussian_log_ratio(x, mu, floored))
    for got, want in zip(gaussian_kl_stats(mu, holed), gaussian_kl_stats(mu, floored), strict=True):
        assert torch.equal(got, want)
        assert got.isfinite().all()


def test_nan_is_not_hidden() -> None:
    x, mu, gamma = torch.zeros(4, 70), torch.zeros(2, 70), torch.ones(2, 70)
    for spoiled in (x, mu, gamma):
        spoiled[-1, 66] = float("nan")
        assert gaussian_log_ratio(x, mu, gamma)[-1, -1].isnan()
        spoiled[-1, 66] = 1.0
    gamma[1, 3] = float("nan")
    assert gaussian_kl_stats(mu, gamma).mean.isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, generator: torch.Generator) -> None:
    x, mu, gamma = draw(generator, 4, 3, (3, 9, 9), dtype)
    got = gaussian_log_ratio(x, mu, gamma)
    assert got.dtype == torch.float32
    assert relative_error(got, scipy_log_ratio(x, mu, gamma)) < 1e-5


def test_strided_inputs(generator: torch.Generator) -> None:
    x, mu, gamma = draw(generator, 6, 4, (3, 8, 10), torch.float32)
    views = [t.transpose(2, 3)[::2] for t in (x, mu, gamma)]
    assert not views[0].is_contiguous()
    assert torch.equal(gaussian_log_ratio(*views), gaussian_log_ratio(*[v.contiguous() for v in views]))
    assert torch.equal(gaussian_kl_stats(*views[1:]).mean, gaussian_kl_stats(*[v.contiguous() for v in views[1:]]).mean)


def test_no_inputs_and_no_triggers() -> None:
    mu, gamma = torch.zeros(2, 5), torch.ones(2, 5)
    assert gaussian_log_ratio(torch.zeros(0, 5), mu, gamma).shape == (0, 2)
    assert gaussian_log_ratio(torch.zeros(3, 5), mu[:0], gamma[:0]).shape == (3, 0)
    assert gaussian_kl_stats(mu[:0], gamma[:0]).mean.shape == (0,)


def test_an_input_does_not_depend_on_its_company(generator: torch.Generator) -> None:
    x, mu, gamma = draw(generator, 41, 5, (3, 11, 11), torch.float32)
    triggers = standardise(mu, gamma)
    together = standardised_log_ratio(x, triggers)
    alone = torch.cat([standardised_log_ratio(x[i : i + 1], triggers) for i in range(len(x))])
    assert torch.equal(together, alone)


def test_results_carry_no_gradient(generator: torch.Generator) -> None:
    x, mu, gamma = (t.requires_grad_() for t in draw(generator, 3, 2, (9,), torch.float64))
    results = gaussian_log_ratio(x, mu, gamma), *gaussian_kl_stats(mu, gamma)
    assert not any(result.requires_grad for result in results)


def test_registration(generator: torch.Generator) -> None:
    x, mu, gamma = draw(generator, 4, 3, (10,), torch.float32)
    torch.library.opcheck(torch.ops.seal_fast.gaussian_kl_stats.default, (mu, gamma))
    torch.library.opcheck(torch.ops.seal_fast.gaussian_log_ratio.default, (x, *standardise(mu, gamma)))
    assert kl_stats_op.name == "gaussian_kl_stats"
    assert log_ratio_op.name == "gaussian_log_ratio"


@pytest.mark.parametrize(
    ("x", "mu", "gamma", "message"),
    [
        (torch.zeros(2, 5), torch.zeros(3, 5), torch.ones(3, 6), "gamma must be"),
        (torch.zeros(2, 4), torch.zeros(3, 5), torch.ones(3, 5), "x must be"),
        (torch.zeros(2, 5, 1), torch.zeros(3, 1, 5), torch.ones(3, 1, 5), "x must be"),
        (torch.zeros(5), torch.zeros(3, 5), torch.ones(3, 5), "x must be"),
        (torch.zeros(2, 0), torch.zeros(3, 0), torch.ones(3, 0), "mu must be"),
        (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(3, 5), torch.ones(3, 5), "floating point"),
    ],
)
def test_bad_arguments_are_named(x: Tensor, mu: Tensor, gamma: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gaussian_log_ratio(x, mu, gamma)


def test_bad_trigger_shapes_are_named_by_kl_stats() -> None:
    with pytest.raises(ValueError, match="gamma must be"):
        gaussian_kl_stats(torch.zeros(2, 5), torch.ones(2, 4))


@needs_native
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("suffix", ["f32", "f64"])
@pytest.mark.parametrize(("n", "k", "shape"), SHAPES)
def test_every_instruction_set_fills_its_output(
    n: int, k: int, shape: tuple[int, ...], suffix: str, threads: int, generator: torch.Generator
) -> None:
    dtype = {"f32": torch.float32, "f64": torch.float64}[suffix]
    x, mu, gamma = (t.flatten(1) for t in draw(generator, n, k, shape, dtype))
    d = x.shape[1]
    scale, shift, offset = standardise(mu, gamma)
    wanted_ratio, wanted_stats = scipy_log_ratio(x, mu, gamma), reference_gaussian_kl_stats(mu, gamma)
    for isa in LEVELS:
        ratio, stats = torch.full((n, k), torch.nan, dtype=torch.float64), torch.full((k, 3), torch.nan, dtype=torch.float64)
        tensors = addresses(x=x, scale=scale, shift=shift, offset=offset, out=ratio)
        log_ratio = getattr(MODULE, f"gaussian_log_ratio_{suffix}")
        log_ratio({**tensors, "inputs": n, "triggers": k, "dims": d}, threads, isa)
        kl_stats = getattr(MODULE, f"gaussian_kl_stats_{suffix}")
        numbers = {"gamma_floor": GAMMA_FLOOR, "triggers": k, "dims": d}
        kl_stats({**addresses(mu=mu, gamma=gamma, stats=stats), **numbers}, threads, isa)
        torch.testing.assert_close(ratio, wanted_ratio, rtol=RELATIVE[dtype], atol=RELATIVE[dtype] * d)
        torch.testing.assert_close(stats, wanted_stats, rtol=1e-10, atol=1e-13)


NO_TRIGGERS = {**addresses(mu=None, gamma=None, stats=None), "gamma_floor": GAMMA_FLOOR, "triggers": 0, "dims": 1}


@needs_native
def test_an_instruction_set_this_processor_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="instruction set"):
        MODULE.gaussian_kl_stats_f32(NO_TRIGGERS, 1, 99)


@needs_native
def test_arguments_that_are_missing_or_unknown_are_named() -> None:
    with pytest.raises(TypeError, match="gaussian_kl_stats_f32 lacks the argument stats"):
        MODULE.gaussian_kl_stats_f32({name: value for name, value in NO_TRIGGERS.items() if name != "stats"}, 1)
    with pytest.raises(TypeError, match="gaussian_kl_stats_f32 takes no argument sigma"):
        MODULE.gaussian_kl_stats_f32({**NO_TRIGGERS, "sigma": 0}, 1)
    with pytest.raises(TypeError, match="float"):
        MODULE.gaussian_kl_stats_f32({**NO_TRIGGERS, "dims": 1.5}, 1)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_cuda_kernels_were_compiled() -> None:
    assert CUDA.module is not None, CUDA.reason
    assert CUDA.module.gaussian_log_ratio_slices(1, 3 * 256 * 256) > 1


@pytest.mark.usefixtures("kernels_without_gpu")
def test_a_failed_cuda_launch_raises() -> None:
    with pytest.raises(RuntimeError, match="CUDA error"):
        CUDA.module.gaussian_kl_stats_f32({**NO_TRIGGERS, "triggers": 1}, 0, 0)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "k", "shape"), [*SHAPES, (300, 9, (3, 64, 64))])
def test_gpu_agrees(n: int, k: int, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> None:
    x, mu, gamma = draw(generator, n, k, shape, dtype)
    got = gaussian_log_ratio(x.cuda(), mu.cuda(), gamma.cuda()).cpu().double()
    torch.testing.assert_close(got, scipy_log_ratio(x, mu, gamma), rtol=RELATIVE[dtype], atol=RELATIVE[dtype] * mu[0].numel())
    stats = torch.stack(gaussian_kl_stats(mu.cuda(), gamma.cuda()), 1).cpu()
    torch.testing.assert_close(stats, reference_gaussian_kl_stats(mu.flatten(1), gamma.flatten(1)), rtol=1e-10, atol=1e-13)
