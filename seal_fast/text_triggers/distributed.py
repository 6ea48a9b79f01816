"""Several processes that train one student: a launcher starts them, each draws its own batches, gradients are averaged."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def processes() -> tuple[int, int]:
    """Rank and number of the processes that share the training."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@contextmanager
def joined() -> Iterator[bool]:
    """Join the processes that torchrun or accelerate launch started, if one did; yields whether this is the first.

    Both tell by WORLD_SIZE, RANK and LOCAL_RANK. On GPUs each process takes the one of its LOCAL_RANK.
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


def average_gradients(parameters: Iterable[Tensor], count: int) -> None:
    """Mean over the `count` processes of each parameter's gradient."""
    if count > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= count
