"""Record an iteration once as a CUDA graph, then launch it as a whole.

An iteration is more than a thousand kernels. At the batch sizes that TERD uses each kernel is shorter than its launch, so the
GPU would wait for the host. A CUDA graph launches all of them at once.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TOLERANCE = 0.02
"""Largest error of a recording, relative to the norm of each tensor: bfloat16 rounds to a 256th."""

Record = Callable[[Callable[[], None], Sequence[Tensor]], Callable[[], None]]
"""Takes an iteration and all tensors that it changes; returns a function that runs it again on the same memory."""

_RECORDING = threading.Lock()
"""Lock for one recording at a time: each frees the memory that torch caches, which it must not do while another one runs."""


def capture_graph(iteration: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
    """Record `iteration` as one CUDA graph; the function returned runs it again, without Python and on the same memory.

    Args:
        iteration: reads and writes tensors that stay where they are, does not wait for the GPU and draws no random number. It
            must have run before: libraries choose their kernels in the first run, which a recording cannot hold.
        state: all tensors that it changes, on one GPU. They are left as they were.

    Raises:
        ValueError: the state is not on a GPU.
    """
    if any(not x.is_cuda for x in state):
        raise ValueError("only work on a CUDA device can be recorded as a CUDA graph: run the iteration itself")
    with torch.cuda.device(state[0].device):
        before = copies(state)
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            # libraries allocate a workspace for every stream
            iteration()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads may work on other models meanwhile
        with _RECORDING, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            iteration()
        put_back(state, before)
    return graph.replay


def verified_graph(
    iteration: Callable[[], None], state: Sequence[Tensor], record: Record = capture_graph
) -> Callable[[], None] | None:
    """Record an iteration and check that the recording computes the same; `state` is left as it was.

    Returns None, with a warning, if the iteration cannot be recorded because it waits for the host, or if the recording leaves
    other values.
    """
    before = copies(state)
    iteration()
    expected = copies(state)
    put_back(state, before)
    try:
        run = record(iteration, state)
        run()
        failure = None if all(map(_agree, state, expected)) else "the recording computes other values"
    except RuntimeError as error:
        failure = str(error)
    put_back(state, before)
    if failure is None:
        return run
    warnings.warn(
        f"an iteration could not be recorded as a CUDA graph, so its kernels are launched one by one: {failure}", stacklevel=2
    )
    return None


def _agree(got: Tensor, want: Tensor) -> bool:
    """Whether tensors agree as a whole: where a gradient is nearly 0, rounding may reverse a step of Adam."""
    return bool((got - want).norm() <= TOLERANCE * want.norm())


def copies(state: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().clone() for x in state]


@torch.no_grad()
def put_back(state: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    for x, kept in zip(state, before, strict=True):
        x.copy_(kept)
