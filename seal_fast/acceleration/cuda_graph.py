"""An iteration recorded once and then launched as a whole.

An iteration is more than a thousand kernels. At the batches TERD uses each is shorter than its launch, so the GPU would wait
for the host; a CUDA graph launches all of them at once.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TOLERANCE = 0.02
"""Of what a recording leaves, relative to the norm of each tensor: bfloat16 rounds to a 256th."""

Record = Callable[[Callable[[], None], Sequence[Tensor]], Callable[[], None]]
"""Makes of an iteration and all that it changes a function that runs it again on the same memory, as `captured`."""

_RECORDING = threading.Lock()
"""One recording at a time: each empties the memory that torch keeps, which it may not do while another one runs."""


def capture_graph(iteration: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
    """`iteration` as one CUDA graph: what comes back runs it again, without Python and on the same memory.

    Args:
        iteration: reads and writes tensors that stay where they are, waits for nothing and draws nothing. It has run before:
            libraries choose their kernels in the first run, which a recording must not.
        state: all that it changes, on one GPU. The run before the recording changes it too; it is put back.

    Raises:
        ValueError: the state is not on a GPU.
    """
    if any(not x.is_cuda for x in state):
        raise ValueError("only work on a CUDA device can be captured: run the iteration itself")
    with torch.cuda.device(state[0].device):
        before = copies(state)
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            # libraries take a workspace for every stream
            iteration()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads may go on with other models
        with _RECORDING, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            iteration()
        put_back(state, before)
    return graph.replay


def verified_graph(
    iteration: Callable[[], None], state: Sequence[Tensor], record: Record = capture_graph
) -> Callable[[], None] | None:
    """What `record` makes of an iteration, once it was seen to do what the iteration does; `state` is left as it was.

    None, with a warning, where the iteration cannot be recorded, because it waits for the host, or where another run of the
    recording leaves something else.
    """
    before = copies(state)
    iteration()
    expected = copies(state)
    put_back(state, before)
    try:
        run = record(iteration, state)
        run()
        failure = None if all(map(_alike, state, expected)) else "the recording gives other answers"
    except RuntimeError as error:
        failure = str(error)
    put_back(state, before)
    if failure is None:
        return run
    warnings.warn(
        f"an iteration is not recorded as a CUDA graph, so its kernels are launched one by one: {failure}", stacklevel=2
    )
    return None


def _alike(got: Tensor, want: Tensor) -> bool:
    """As a whole: where a gradient is nearly 0, rounding may turn a step of Adam around."""
    return bool((got - want).norm() <= TOLERANCE * want.norm())


def copies(state: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().clone() for x in state]


@torch.no_grad()
def put_back(state: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    for x, kept in zip(state, before, strict=True):
        x.copy_(kept)
