from __future__ import annotations

import io

import pytest

from seal_fast.report.progress import ProgressDisplay
from seal_fast.results.progress import Progress


def test_an_interrupt_that_was_swallowed_is_raised_at_the_next_event():
    display = ProgressDisplay(io.StringIO(), quiet=True)
    at = Progress("model", 1, 2, "loading")
    display.on_progress(at)
    display.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        display.on_progress(at)


def test_models_under_way_at_the_same_time_are_shown():
    display = ProgressDisplay(io.StringIO(), quiet=False)

    def shown():
        return [(task.description, task.completed) for task in display.bar.tasks if task.visible]

    display.on_progress(Progress("a", 1, 3, "search", 2, 4, 0.25))
    display.on_progress(Progress("b", 2, 3, "loading"))
    display.on_progress(Progress("b", 2, 3, "activation", 1, 2, 0.5))
    assert shown() == [("0/3 done", 0.75), ("search 2/4: a", 0.25), ("activation 1/2: b", 0.5)]
    display.done("b", 1, 3, "b: clean")
    assert shown() == [("1/3 done", 1.25), ("search 2/4: a", 0.25)]


def test_a_single_model_has_one_bar():
    display = ProgressDisplay(io.StringIO(), quiet=False)
    display.on_progress(Progress("a", 1, 1, "search", 2, 4, 0.25))
    assert [task.description for task in display.bar.tasks if task.visible] == ["search 2/4: a"]


def test_a_line_of_a_result_fits_the_console(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream = io.StringIO()
    ProgressDisplay(stream, quiet=True).done("model", 1, 1, f"model: error, {'no such file ' * 20}(0.1 s)")
    assert " ".join(stream.getvalue().split()).count("no such file") == 20
    assert max(map(len, stream.getvalue().splitlines())) <= 80
