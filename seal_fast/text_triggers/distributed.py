"""Training of one student in several processes. A launcher starts them; each draws its own batches; gradients are averaged."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world_size() -> tuple[int, int]:
    """Rank of this process and number of the processes that train together; (0, 1) outside a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@contextmanager
def process_group() -> Iterator[bool]:
    """Join the process group if torchrun or accelerate launch started this process; yields whether its rank is 0.

    Both launchers set WORLD_SIZE, RANK and LOCAL_RANK. On GPUs each process uses the one with the number LOCAL_RANK.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpus else "gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def average_gradients(parameters: Iterable[Tensor], world_size: int) -> None:
    """Replace each parameter's gradient by its mean over the processes."""
    if world_size > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size
