"""Progress on stderr: one line per finished model and, on a terminal, bars of the models under way."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING

from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from seal_fast.report.console import console_for, number, safe

if TYPE_CHECKING:
    from seal_fast.results.progress import Progress
    from seal_fast.results.scan import ModelResult


class ProgressDisplay:
    """Shows the progress of a workflow. It is a context manager; its methods are the callbacks of the workflow.

    Attributes:
        finished: number of finished models.
        total: number of all models; 0 before the first event.
        interrupted: if set, the next event raises KeyboardInterrupt.
    """

    def __init__(self, stream: IO[str], quiet: bool) -> None:
        self.finished = self.total = 0
        self.interrupted = False
        self.console = console_for(stream)
        text = TextColumn("{task.description}", markup=False)
        self.bar = Bar(
            # leaves room for the name of a model in 80 columns
            BarColumn(20),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            text,
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self.whole = self.bar.add_task("", total=None)
        self.running: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressDisplay:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def on_progress(self, at: Progress) -> None:
        """Update the bar of the current model."""
        if self.interrupted:
            raise KeyboardInterrupt
        self.total = at.total
        if at.model not in self.running:
            self.running[at.model] = self.bar.add_task("", total=1.0)
        step = f" {at.iteration}/{at.iterations}" if at.iterations else ""
        what = f"{at.stage}{step}: {safe(at.model)}"
        self.bar.update(self.running[at.model], completed=at.fraction, description=what)
        self._show_whole()

    def done(self, name: str, finished: int, total: int, line: str) -> None:
        """Remove the bar of the model `name` and print `line`, its result, after the number of finished models."""
        self.finished, self.total = finished, total
        if (task := self.running.pop(name, None)) is not None:
            self.bar.remove_task(task)
        self._show_whole()
        self.console.print(f"[{finished}/{total}] {safe(line)}")

    def on_result(self, model: ModelResult, finished: int, total: int) -> None:
        """`done` with the result of a scan. The report gives the reasons; only that of an error cannot wait for it."""
        how = "resumed" if model.resumed else f"{number(model.seconds, 1)} s"
        reason = f", {model.error}" if model.error else ""
        self.done(model.path, finished, total, f"{model.path}: {model.verdict.value}{reason} ({how})")

    def _show_whole(self) -> None:
        """Update the bar of all models, which is hidden if there is only one model."""
        done = self.finished + sum(task.completed for task in self.bar.tasks if task.id in self.running.values())
        what = f"{self.finished}/{self.total} done"
        self.bar.update(self.whole, total=self.total, completed=done, description=what, visible=self.total > 1)
