"""Run each task in a process of its own, several at a time: one that is killed costs its own result only."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")
Event = TypeVar("Event")


@dataclass(frozen=True)
class Died:
    """The end of a process that gave no result.

    Attributes:
        exit_code: exit code of the process; if negative, the number of the signal that killed it.
        seconds: how long the process ran.
    """

    exit_code: int | None
    seconds: float


@dataclass
class _Running(Generic[Task]):
    task: Task
    process: BaseProcess
    started: float
    threads: int


def _context() -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # torch is imported once: processes then start within milliseconds and share its memory
    context.set_forkserver_preload(["seal_fast.ignore_interrupts", "seal_fast.workflows.scan"])
    return context


def in_processes(
    work: Callable[[Task, Callable[[Event], None]], Result],
    tasks: Sequence[Task],
    jobs: int,
    on_event: Callable[[Event], None],
) -> Iterator[tuple[Task, Result | Died]]:
    """Run every task in a process of its own, started in the order given.

    The processes share torch's threads. Once fewer tasks than `jobs` are left, each gets a larger share.

    Args:
        work: called in the process with the task and a function that sends an event. `work` and its result must pickle, and
            the result must not be None.
        tasks: arguments of `work`; must pickle.
        jobs: processes at a time.
        on_event: called in this process with every event.

    Yields:
        Each task with its result, as they finish.

    Every process is killed when the iterator is closed or an exception leaves it; KeyboardInterrupt is one.
    """
    context, cores = _context(), torch.get_num_threads()
    waiting = deque(tasks)
    running: dict[Connection, _Running[Task]] = {}
    try:
        while waiting or running:
            threads = max(1, cores // min(jobs, len(waiting) + len(running)))
            while waiting and len(running) < jobs:
                ours, theirs = context.Pipe()
                task = waiting.popleft()
                process = context.Process(target=_child, args=(work, task, threads, theirs), daemon=True)  # type: ignore[attr-defined]
                with _undisturbed():
                    process.start()
                    running[ours] = _Running(task, process, time.perf_counter(), threads)
                theirs.close()
            _share_out(running, threads)
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                outcome = _received(pipe, running[pipe], on_event)
                if outcome is not None:
                    pipe.close()
                    yield running.pop(pipe).task, outcome
    finally:
        for one in running.values():
            one.process.kill()
        for one in running.values():
            one.process.join()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Delay Ctrl-C: a request that is cut short ends the fork server with a traceback."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupts:
            signal.raise_signal(signal.SIGINT)


def _share_out(running: dict[Connection, _Running[Task]], threads: int) -> None:
    """Tell processes with another number of threads that it has changed."""
    for pipe, one in running.items():
        if one.threads != threads:
            one.threads = threads
            # a process that has just died is noticed when its pipe is read
            with suppress(OSError):
                pipe.send(threads)


def _received(pipe: Connection, one: _Running[Any], on_event: Callable[[Any], None]) -> Any:
    """The result that a process sent, or its end without one; None after an event."""
    try:
        finished, message = pipe.recv()
    except (EOFError, OSError):
        one.process.join()
        return Died(one.process.exitcode, time.perf_counter() - one.started)
    if finished:
        return message
    on_event(message)
    return None


def _child(work: Callable[[Any, Callable[[Any], None]], Any], task: Any, threads: int, pipe: Connection) -> None:
    # where no fork server has imported seal_fast.ignore_interrupts
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)

    def on_event(event: Any) -> None:
        pipe.send((False, event))
        if pipe.poll():
            torch.set_num_threads(pipe.recv())

    # the parent may be gone
    with suppress(OSError):
        pipe.send((True, work(task, on_event)))
