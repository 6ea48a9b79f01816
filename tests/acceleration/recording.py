"""Recorders that stand in for CUDA graphs: iterations on memory that stays where it is, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


class OnTheHost:
    """Runs the iteration itself, on the same memory as a graph would, and counts the recordings."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, iteration: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
        self.count += 1
        return iteration


def fails(iteration: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
    raise RuntimeError("operation not permitted when stream is capturing")


def does_nothing(iteration: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
    return lambda: None


def leaves_noise(iteration: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
    def run() -> None:
        iteration()
        state[-1].mul_(1.05)

    return run
