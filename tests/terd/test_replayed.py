"""Passes on memory that stays where it is give what the network gives; on a GPU they are graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from seal_fast.terd.replayed import KEPT, WORTH_RECORDING, Record, Replayed


class Network(nn.Module):
    """Depends on both inputs, pixel by pixel and across the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.conv(x).tanh() * (1 + condition.float().view(-1, 1, 1, 1) / 1000) + x.mean(dim=(2, 3), keepdim=True)


class OnTheHost:
    """Runs the iteration itself, on the same memory as a graph would; counts what it was asked to record."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, iteration: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
        self.count += 1
        for x in state:
            x.fill_(float("nan"))
        return iteration


def inputs(rows: int, generator: torch.Generator, device: str = "cpu") -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, 3, 7, 5, generator=generator)
    return x.to(device), torch.randint(1000, (rows,), generator=generator).to(device)


@torch.no_grad()
def test_passes_on_kept_memory_are_those_of_the_network(generator: torch.Generator) -> None:
    network, record = Network(), OnTheHost()
    replayed = Replayed(network, record)
    shapes = range(1, KEPT + 3)
    found, expected = [], []
    for rows in (*shapes, *shapes):
        for _ in range(WORTH_RECORDING + 2):
            x, t = inputs(rows, generator)
            found.append(replayed(x, t))
            expected.append(network(x, t))
    # all of them at the end: what came back must not change when the memory is used again
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    # in the second round those of the first that were kept are no longer there when their turn comes
    assert record.count == 2 * len(shapes)
    assert len(replayed.recordings) == KEPT


@torch.no_grad()
def test_shapes_that_come_up_rarely_are_not_recorded(generator: torch.Generator) -> None:
    record = OnTheHost()
    replayed = Replayed(Network(), record)
    for rows in range(1, 20):
        for _ in range(WORTH_RECORDING):
            replayed(*inputs(rows, generator))
    assert record.count == 0


def test_the_gradient_is_that_of_the_network(generator: torch.Generator) -> None:
    network = Network().requires_grad_(False)
    replayed = Replayed(network, OnTheHost())
    for _ in range(WORTH_RECORDING + 2):
        x, t = inputs(2, generator)
        x.requires_grad_()
        (got,), (want,) = (torch.autograd.grad(f(x, t).square().sum(), x) for f in (replayed, network))
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@torch.no_grad()
def test_precision_belongs_to_a_recording(generator: torch.Generator) -> None:
    replayed = Replayed(Network(), OnTheHost())
    for dtype in (torch.float32, torch.bfloat16):
        for _ in range(WORTH_RECORDING + 2):
            x, t = inputs(2, generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                torch.testing.assert_close(replayed(x, t), replayed.network(x, t), rtol=0, atol=0)


def fails(iteration: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
    raise RuntimeError("operation not permitted when stream is capturing")


def does_nothing(iteration: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
    return lambda: None


@pytest.mark.parametrize("record", [fails, does_nothing])
@torch.no_grad()
def test_what_cannot_be_recorded_goes_on_pass_by_pass(generator: torch.Generator, record: Record) -> None:
    network = Network()
    replayed = Replayed(network, record)
    for rows in (2, 3):
        for count in range(1, WORTH_RECORDING + 3):
            x, t = inputs(rows, generator)
            first = rows == 2 and count == WORTH_RECORDING + 1
            with pytest.warns(UserWarning, match="pass by pass") if first else nullcontext():
                found = replayed(x, t)
            torch.testing.assert_close(found, network(x, t), rtol=0, atol=0)


@pytest.mark.usefixtures("gpu")
@torch.no_grad()
def test_graphs_give_what_the_network_gives(generator: torch.Generator) -> None:
    network = Network().cuda()
    replayed = Replayed(network)
    for half in (False, True):
        for rows in (3, 5, 3):
            for _ in range(WORTH_RECORDING + 3):
                x, t = inputs(rows, generator, "cuda")
                with torch.autocast("cuda", torch.bfloat16, enabled=half):
                    torch.testing.assert_close(replayed(x, t), network(x, t))
    assert len(replayed.recordings) == 4
