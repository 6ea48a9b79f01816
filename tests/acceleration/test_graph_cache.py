"""Calls on memory that stays where it is compute what the function computes; on a GPU they are CUDA graphs."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from seal_fast.acceleration.cuda_graph import Record, verified_graph
from seal_fast.acceleration.graph_cache import CALLS_BEFORE_RECORDING, CAPACITY, GraphCache, GraphCachedNetwork
from tests.acceleration.recording import OnTheHost, does_nothing, fails, leaves_noise


class Network(nn.Module):
    """Depends on both inputs, pixel by pixel and across the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.conv(x).tanh() * (1 + condition.float().view(-1, 1, 1, 1) / 1000) + x.mean(dim=(2, 3), keepdim=True)


def inputs(images: int, generator: torch.Generator, device: str = "cpu") -> tuple[Tensor, Tensor]:
    x = torch.randn(images, 3, 7, 5, generator=generator)
    return x.to(device), torch.randint(1000, (images,), generator=generator).to(device)


def moved(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """An iteration: the next x, and a number."""
    return 0.9 * x + t.float().view(-1, 1, 1, 1).sin(), x.square().sum()


def test_calls_on_kept_memory_are_those_of_the_network(generator: torch.Generator) -> None:
    network, record = Network(), OnTheHost()
    cached = GraphCachedNetwork(network, GraphCache(record))
    shapes = range(1, CAPACITY + 3)
    found, expected = [], []
    for images in (*shapes, *shapes):
        for _ in range(CALLS_BEFORE_RECORDING + 2):
            x, t = inputs(images, generator)
            found.append(cached(x, t))
            expected.append(network(x, t))
    # all of them at the end: what came back must not change when the memory is used again
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    # in the second round those of the first that were kept are no longer there when their turn comes
    assert record.count == 2 * len(shapes)
    assert len(cached.graphs.recordings) == CAPACITY


def test_outputs_of_one_iteration_can_be_inputs_of_the_next(generator: torch.Generator) -> None:
    record = OnTheHost()
    graphs = GraphCache(record)
    x, t = inputs(3, generator)
    want = x
    for _ in range(CALLS_BEFORE_RECORDING + 5):
        x, size = graphs("moved", moved, x, t)
        want, want_size = moved(want, t)
        assert x.equal(want)
        assert size.equal(want_size)
    assert record.count == 1


def test_names_distinguish_functions_of_one_shape(generator: torch.Generator) -> None:
    graphs = GraphCache(OnTheHost())
    for _ in range(CALLS_BEFORE_RECORDING + 2):
        x, t = inputs(2, generator)
        assert graphs("moved", moved, x, t)[0].equal(moved(x, t)[0])
        assert graphs("same", lambda x, t: (x,), x, t)[0].equal(x)


def test_shapes_that_come_up_rarely_are_not_recorded(generator: torch.Generator) -> None:
    record = OnTheHost()
    graphs = GraphCache(record)
    for images in range(1, 20):
        for _ in range(CALLS_BEFORE_RECORDING):
            graphs("moved", moved, *inputs(images, generator))
    assert record.count == 0


@pytest.mark.parametrize("record", [fails, does_nothing, leaves_noise])
def test_a_function_that_cannot_be_recorded_is_called_each_time(generator: torch.Generator, record: Record) -> None:
    graphs = GraphCache(record)
    for images in (2, 3):
        for count in range(1, CALLS_BEFORE_RECORDING + 3):
            x, t = inputs(images, generator)
            first = images == 2 and count == CALLS_BEFORE_RECORDING + 1
            with pytest.warns(UserWarning, match="one by one") if first else nullcontext():
                found = graphs("moved", moved, x, t)
            for got, want in zip(found, moved(x, t), strict=True):
                assert got.equal(want)


@pytest.mark.parametrize("record", [OnTheHost(), fails, does_nothing, leaves_noise], ids=["good", "fails", "nothing", "noise"])
def test_recording_changes_no_state(generator: torch.Generator, record: Record) -> None:
    state, other = torch.randn(2, 5, generator=generator)
    before = state.clone()

    def iteration() -> None:
        state.mul_(0.5).add_(other)

    good = isinstance(record, OnTheHost)
    with nullcontext() if good else pytest.warns(UserWarning, match="one by one"):
        run = verified_graph(iteration, [state], record)
    assert state.equal(before)
    assert (run is not None) == good
    if run is not None:
        run()
        torch.testing.assert_close(state, 0.5 * before + other)


@pytest.mark.usefixtures("gpu")
def test_graphs_give_what_the_functions_give(generator: torch.Generator) -> None:
    network = Network().cuda()
    for half in (False, True):
        graphs = GraphCache()
        passes = GraphCachedNetwork(network, graphs)
        for images in (3, 5, 3):
            for _ in range(CALLS_BEFORE_RECORDING + 3):
                x, t = inputs(images, generator, "cuda")
                with torch.autocast("cuda", torch.bfloat16, enabled=half), torch.no_grad():
                    torch.testing.assert_close(passes(x, t), network(x, t))
                torch.testing.assert_close(graphs("moved", moved, x, t), moved(x, t))
        assert graphs.recordable
        assert len(graphs.recordings) == 4
