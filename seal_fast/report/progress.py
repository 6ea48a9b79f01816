"""Progress on stderr: one line per finished model, and a bar where there is a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import IO, TYPE_CHECKING

from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from seal_fast.report.console import console_for, number, safe

if TYPE_CHECKING:
    from seal_fast.scan.result import ModelResult
    from seal_fast.scan.run import Progress


class ProgressDisplay:
    """Shows a scan as it goes; a context manager whose methods are the scan's callbacks.

    Attributes:
        finished: models done so far.
        total: models to do; 0 before the first event.
        interrupted: set to stop at the next event with KeyboardInterrupt.
    """

    def __init__(self, stream: IO[str], quiet: bool) -> None:
        self.finished = self.total = 0
        self.interrupted = False
        self.console = console_for(stream)
        text = TextColumn("{task.description}", markup=False)
        self.bar = Bar(
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            text,
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=None)

    def __enter__(self) -> ProgressDisplay:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def on_progress(self, at: Progress) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.total = at.total
        step = f" {at.iteration}/{at.iterations}" if at.iterations else ""
        what = f"{at.index - 1}/{at.total} done, {at.stage}{step}: {safe(at.model)}"
        self.bar.update(self.task, total=at.total, completed=at.index - 1 + at.fraction, description=what)

    def done(self, index: int, total: int, line: str) -> None:
        """A model is finished; `line` says how it ended."""
        self.finished, self.total = index, total
        self.console.print(f"[{index}/{total}] {safe(line)}", soft_wrap=True)

    def on_result(self, model: ModelResult, index: int, total: int) -> None:
        self.done(index, total, f"{model.path}: {model.verdict.value}, {model.reason} ({number(model.seconds, 1)} s)")
