"""Run each task in a thread of this process, on a CUDA stream of its own: one small model leaves most of a GPU idle.

Processes would not help: a GPU runs the work of one process at a time, and every process holds a CUDA context.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")
Event = TypeVar("Event")


class _Stopped(BaseException):
    """Ends a task whose result nobody waits for; a BaseException, so that no `except Exception` catches it."""


def on_streams(
    work: Callable[[Task, Callable[[Event], None]], Result],
    tasks: Sequence[Task],
    jobs: int,
    on_event: Callable[[Event], None],
) -> Iterator[tuple[Task, Result]]:
    """Run every task in a thread, on a stream of its own where there is a GPU; started in the order given.

    Args:
        work: called in a thread with the task and a function that sends an event.
        tasks: arguments of `work`.
        jobs: threads at a time.
        on_event: called with every event, in the thread that iterates.

    Yields:
        Each task with its result, as they finish.

    An exception of `work` is raised here. When the iterator is closed or an exception leaves it, every thread ends at its next
    event.
    """
    news: SimpleQueue[Any] = SimpleQueue()
    stopped = threading.Event()

    def send(event: Event) -> None:
        if stopped.is_set():
            raise _Stopped
        news.put(event)

    def run(task: Task) -> tuple[Task, Result]:
        with torch.cuda.stream(torch.cuda.Stream() if torch.cuda.is_available() else None):
            return task, work(task, send)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for task in tasks:
                pool.submit(run, task).add_done_callback(news.put)
            for _ in tasks:
                while not isinstance(one := news.get(), Future):
                    on_event(one)
                yield one.result()
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
