"""A cache of CUDA graphs, one for each function of tensors and each set of shapes that are called again and again.

A search runs the same iteration ten times, or the same pass of the network a hundred times, then others.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seal_fast.acceleration.cuda_graph import Record, capture_graph, verified_graph

CALLS_BEFORE_RECORDING = 2
"""Calls of one function with one set of shapes before it is recorded: a recording costs about four calls."""
CAPACITY = 4
"""Recordings in the cache, those used last. Each holds the memory of its function."""


class _Recording(NamedTuple):
    """A recording, with the inputs and outputs that it reads and writes."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    run: Callable[[], None]


class GraphCache:
    """Calls functions, and records those that are called again. Once one cannot be recorded, no other is.

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
            name: equal for functions that compute the same.
            function: leaves its inputs as they are, does not wait for the GPU and draws no random number.
            inputs: on one device.
        """
        key = name, *((x.shape, x.dtype) for x in inputs)
        self.calls[key] += 1
        if not self.recordable or self.calls[key] <= CALLS_BEFORE_RECORDING:
            return function(*inputs)
        if key not in self.recordings and not self.record_call(key, function, inputs):
            return function(*inputs)
        self.recordings.move_to_end(key)
        recording = self.recordings[key]
        for mine, given in zip(recording.inputs, inputs, strict=True):
            mine.copy_(given)
        recording.run()
        return tuple(out.clone() for out in recording.outputs)

    def record_call(self, key: Any, function: Callable[..., tuple[Tensor, ...]], given: Sequence[Tensor]) -> bool:
        """Record a call, in place of the recording that was unused for the longest time; returns whether that was possible."""
        inputs = [x.clone() for x in given]
        outputs = [torch.full_like(x, torch.nan) for x in function(*inputs)]

        def iteration() -> None:
            for out, computed in zip(outputs, function(*inputs), strict=True):
                out.copy_(computed)

        run = verified_graph(iteration, outputs, self.record)
        if run is None:
            self.recordable = False
            self.recordings.clear()
            return False
        self.recordings[key] = _Recording(inputs, outputs, run)
        if len(self.recordings) > CAPACITY:
            self.recordings.popitem(last=False)
        return True


class GraphCachedNetwork(nn.Module):
    """A frozen network, `network(x, condition)`, whose passes without a gradient are recorded.

    Args:
        network: returns a tensor or an object with `.sample` (diffusers).
        graphs: calls it.
    """

    def __init__(self, network: nn.Module, graphs: GraphCache) -> None:
        super().__init__()
        self.network, self.graphs = network, graphs

    @torch.no_grad()
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        (output,) = self.graphs(self, self.plain, x, condition)
        return output

    def plain(self, x: Tensor, condition: Tensor) -> tuple[Tensor]:
        output = self.network(x, condition)
        return (getattr(output, "sample", output),)
