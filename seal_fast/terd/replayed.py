"""A frozen network whose passes are recorded as CUDA graphs, one for each shape of input that comes up again and again.

A search by sampling is a hundred passes of one shape, then a hundred of another, without gradients. The polish in between
loses starts on the way, so its shapes come up too rarely to be worth a recording.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seal_fast.terd.captured import captured

WORTH_RECORDING = 10
"""Passes of one shape before it is recorded: a recording costs four."""
KEPT = 4
"""Recordings kept, those used last. Each holds the memory of a pass."""

TOLERANCE = 0.02
"""Of a recording, relative to the largest answer: bfloat16 rounds to a 256th."""

Record = Callable[[Callable[[], None], Sequence[Tensor]], Callable[[], None]]


class _Recording(NamedTuple):
    """Inputs and output where the graph reads and writes them."""

    x: Tensor
    condition: Tensor
    out: Tensor
    run: Callable[[], None]


class Replayed(nn.Module):
    """`network(x, condition)`, frozen, as a tensor. Passes that need a gradient go through the network itself.

    A network that cannot be recorded, because it waits for the host, or that another run of its recording gives other answers
    for, goes on pass by pass, with a warning.

    Args:
        network: returns a tensor or an object with `.sample` (diffusers).
        record: `captured`, or another that gives a function which runs an iteration again on the same memory.
    """

    def __init__(self, network: nn.Module, record: Record = captured) -> None:
        super().__init__()
        self.network, self.record = network, record
        self.recordable = True
        self.passes: Counter[Any] = Counter()
        self.recordings: OrderedDict[Any, _Recording] = OrderedDict()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        if (torch.is_grad_enabled() and x.requires_grad) or not self.recordable:
            return self.plain(x, condition)
        device = x.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = x.shape, x.dtype, condition.shape, condition.dtype, autocast
        self.passes[key] += 1
        if self.passes[key] <= WORTH_RECORDING:
            return self.plain(x, condition)
        if key not in self.recordings and not self.recorded(key, x, condition):
            return self.plain(x, condition)
        self.recordings.move_to_end(key)
        recording = self.recordings[key]
        recording.x.copy_(x)
        recording.condition.copy_(condition)
        recording.run()
        return recording.out.clone()

    def plain(self, x: Tensor, condition: Tensor) -> Tensor:
        output = self.network(x, condition)
        found: Tensor = getattr(output, "sample", output)
        return found

    @torch.no_grad()
    def recorded(self, key: Any, x: Tensor, condition: Tensor) -> bool:
        """Keep a recording of a pass, in place of the one that was not used for longest; whether that could be done."""
        x, condition = x.clone(), condition.clone()
        expected = self.plain(x, condition)
        out = torch.empty_like(expected)
        device = x.device.type

        def iteration() -> None:
            # weights in another precision that autocast keeps would be gone when the recording is run
            enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            with torch.autocast(device, dtype, enabled=enabled, cache_enabled=False):
                out.copy_(self.plain(x, condition))

        try:
            run = self.record(iteration, [out])
            run()
            torch.testing.assert_close(out, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max()))
        except (RuntimeError, AssertionError) as error:
            warnings.warn(f"the network is not recorded as a CUDA graph, so it runs pass by pass: {error}", stacklevel=2)
            self.recordable = False
            self.recordings.clear()
            return False
        self.recordings[key] = _Recording(x, condition, out, run)
        if len(self.recordings) > KEPT:
            self.recordings.popitem(last=False)
        return True
