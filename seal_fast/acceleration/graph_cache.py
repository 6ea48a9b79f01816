"""Functions of tensors, recorded as CUDA graphs, one for each function and shapes that come up again and again.

A search is the same iteration ten times, or the same pass of the network a hundred times, then others.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seal_fast.acceleration.cuda_graph import Record, capture_graph, verified_graph

WORTH_RECORDING = 2
"""Calls of one function with one set of shapes before it is recorded: a recording costs about four."""
KEPT = 4
"""Recordings kept, those used last. Each holds the memory of its function."""


class _Recording(NamedTuple):
    """Inputs and outputs where the graph reads and writes them."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    run: Callable[[], None]


class GraphCache:
    """Calls functions, from some call on as recordings. Once one cannot be recorded, none is any more.

    Args:
        record: see `seal_fast.acceleration.cuda_graph.verified_graph`.
    """

    def __init__(self, record: Record = capture_graph) -> None:
        self.record, self.recordable = record, True
        self.calls: Counter[Any] = Counter()
        self.recordings: OrderedDict[Any, _Recording] = OrderedDict()

    def __call__(self, name: Hashable, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        """`function(*inputs)`, without gradients.

        Args:
            name: equal for functions that do the same.
            function: leaves its inputs as they are, waits for nothing and draws nothing.
            inputs: on one device.
        """
        key = name, *((x.shape, x.dtype) for x in inputs)
        self.calls[key] += 1
        if not self.recordable or self.calls[key] <= WORTH_RECORDING:
            return function(*inputs)
        if key not in self.recordings and not self.keep(key, function, inputs):
            return function(*inputs)
        self.recordings.move_to_end(key)
        recording = self.recordings[key]
        for mine, given in zip(recording.inputs, inputs, strict=True):
            mine.copy_(given)
        recording.run()
        return tuple(out.clone() for out in recording.outputs)

    def keep(self, key: Any, function: Callable[..., tuple[Tensor, ...]], given: Sequence[Tensor]) -> bool:
        """Record a call, in place of the recording that was not used for longest; whether that could be done."""
        inputs = [x.clone() for x in given]
        outputs = [torch.full_like(x, torch.nan) for x in function(*inputs)]

        def iteration() -> None:
            for out, found in zip(outputs, function(*inputs), strict=True):
                out.copy_(found)

        run = verified_graph(iteration, outputs, self.record)
        if run is None:
            self.recordable = False
            self.recordings.clear()
            return False
        self.recordings[key] = _Recording(inputs, outputs, run)
        if len(self.recordings) > KEPT:
            self.recordings.popitem(last=False)
        return True


class GraphCachedNetwork(nn.Module):
    """`network(x, condition)`, frozen, as a tensor without a gradient.

    Args:
        network: returns a tensor or an object with `.sample` (diffusers).
        replayed: calls it.
    """

    def __init__(self, network: nn.Module, replayed: GraphCache) -> None:
        super().__init__()
        self.network, self.replayed = network, replayed

    @torch.no_grad()
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        (found,) = self.replayed(self, self.plain, x, condition)
        return found

    def plain(self, x: Tensor, condition: Tensor) -> tuple[Tensor]:
        output = self.network(x, condition)
        return (getattr(output, "sample", output),)
