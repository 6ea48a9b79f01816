"""An iteration recorded once and then launched as a whole.

An iteration is more than a thousand kernels. At the batches TERD uses each is shorter than its launch, so the GPU would wait
for the host; a CUDA graph launches all of them at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UP = 3
"""Runs before the recording: libraries choose their kernels and take their workspaces, which a recording must not."""

_RECORDING = threading.Lock()
"""One recording at a time: each empties the memory that torch keeps, which it may not do while another one runs."""


def captured(iteration: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
    """`iteration` as one CUDA graph: what comes back runs it again, without Python and on the same memory.

    Args:
        iteration: reads and writes tensors that stay where they are, waits for nothing and draws nothing.
        state: all that it changes, on one GPU. The runs before the recording change it too; it is put back.

    Raises:
        ValueError: the state is not on a GPU.
    """
    if any(not x.is_cuda for x in state):
        raise ValueError("only work on a CUDA device can be captured: run the iteration itself")
    with torch.cuda.device(state[0].device):
        before = [x.detach().clone() for x in state]
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                iteration()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads may go on with other models
        with _RECORDING, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            iteration()
        with torch.no_grad():
            for x, kept in zip(state, before, strict=True):
                x.copy_(kept)
    return graph.replay
