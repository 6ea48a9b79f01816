"""Scans of many models: processes, streams, and results of an earlier scan."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from seal_fast import scan
from seal_fast.noise_triggers import TriedCandidate
from seal_fast.report.json import report_json
from seal_fast.results.scan import RESUMED
from seal_fast.workflows.capacity import bytes_on_disk, default_jobs, free_memory, jobs_that_fit, memory_of
from seal_fast.workflows.discovery import find_checkpoints
from seal_fast.workflows.noise_scan import NoiseScan
from seal_fast.workflows.processes import Died, in_processes
from seal_fast.workflows.resume import resumed_results
from seal_fast.workflows.scan_model import ModelScan
from seal_fast.workflows.streams import on_streams

WORK = """
import os, time, torch

def work(task, on_event):
    on_event((task, torch.get_num_threads()))
    if task.startswith("exit"):
        os._exit(int(task.split()[1]))
    if task.startswith("kill"):
        os.kill(os.getpid(), int(task.split()[1]))
    while task == "until it has 2 threads" and torch.get_num_threads() < 2:
        time.sleep(0.01)
        on_event(None)
    while task == "for ever":
        time.sleep(0.01)
        on_event(None)
    return task, torch.get_num_threads()
"""


@pytest.fixture
def threads():
    """threads(n): torch's threads here, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def work(tmp_path, monkeypatch):
    # a function of a test module has no name that another process could import
    (tmp_path / "work_of_test_many.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    import work_of_test_many

    yield work_of_test_many.work
    del sys.modules["work_of_test_many"]


def timeless(results):
    return [replace(result, seconds=0.0) for result in results]


def test_processes_find_what_one_by_one_finds(hub, calibration, tmp_path, threads):
    threads(1)
    events, numbers = [], []
    alone = scan(hub, calibration=calibration, out=tmp_path / "alone")
    together = scan(
        hub,
        calibration=calibration,
        out=tmp_path / "together",
        jobs=2,
        on_progress=events.append,
        on_result=lambda result, number, total: numbers.append((number, total)),
    )
    assert timeless(alone.models) == timeless(together.models)
    assert numbers == [(1, 4), (2, 4), (3, 4), (4, 4)]
    written = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("alone", "together")]
    assert [model["path"] for model in written[0]["models"]] == [model["path"] for model in written[1]["models"]]
    for name in ("a-quiet", "c-loud"):
        one, other = (load_file(tmp_path / folder / name / "trigger.safetensors") for folder in ("alone", "together"))
        assert all(one[key].equal(other[key]) for key in ("mu", "gamma"))
        fractions = [at.fraction for at in events if at.model == name]
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0


def test_threads_find_what_one_by_one_finds(hub, calibration, threads):
    threads(1)
    tasks = list(enumerate(find_checkpoints([hub])))
    scan_model = ModelScan((NoiseScan(calibration),), out=None, total=len(tasks))
    events = []
    together = {task[0]: result for task, result in on_streams(scan_model, tasks, 3, events.append)}
    alone = scan(hub, calibration=calibration)
    assert timeless([together[place] for place in range(len(tasks))]) == timeless(alone.models)
    assert {at.model for at in events} == {result.path for result in alone.models}


@pytest.mark.usefixtures("gpu")
def test_models_at_a_time_on_a_gpu_are_decided_as_alone(hub, calibration):
    alone, together = (scan(hub, calibration=calibration, jobs=jobs).models for jobs in (1, 3))
    for one, other in zip(alone, together, strict=True):
        assert (one.path, one.verdict, one.error) == (other.path, other.verdict, other.error)
        assert one.score == pytest.approx(other.score, rel=1e-2)


def test_streams_tell_events_here_and_run_as_many_as_asked():
    lock, running, most, places = threading.Lock(), [0], [0], []

    def work(task, on_event):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        on_event(task)
        both.wait(timeout=60)
        with lock:
            running[0] -= 1
        return task**2

    both = threading.Barrier(2)
    results = dict(on_streams(work, range(6), 2, lambda event: places.append((event, threading.current_thread()))))
    assert results == {task: task**2 for task in range(6)}
    assert most[0] == 2
    assert {event for event, _ in places} == set(range(6))
    assert {thread for _, thread in places} == {threading.current_thread()}


def test_an_error_in_a_thread_is_raised_and_the_others_end():
    ended = []

    def work(task, on_event):
        if task == "wrong":
            raise ZeroDivisionError(task)
        try:
            while True:
                on_event(task)
                time.sleep(0.001)
        finally:
            ended.append(task)

    with pytest.raises(ZeroDivisionError, match="wrong"):
        list(on_streams(work, ["for ever", "wrong", "never begun"], 2, lambda event: None))
    assert "for ever" in ended


def test_a_killed_process_costs_the_result_of_its_model(write_model, calibration, tmp_path):
    slow = replace(calibration, settings=replace(calibration.settings, estimation_iterations=100))
    for name in "abc":
        write_model(tmp_path / name, seed=ord(name))
    killed = []

    def on_progress(at):
        if not killed:
            killed.append(multiprocessing.active_children()[0])
            killed[0].kill()

    report = scan(tmp_path, calibration=slow, jobs=2, on_progress=on_progress)
    lost = [result for result in report.models if result.verdict == "error"]
    assert [result.path for result in report.models] == ["a", "b", "c"]
    assert len(lost) == 1
    assert "killed by signal 9" in lost[0].error


def test_the_end_of_a_process_is_reported_and_the_others_go_on(work):
    tasks = ["one", "exit 7", f"kill {int(signal.SIGSEGV)}", "exit 0", "two"]
    outcomes = dict(in_processes(work, tasks, 2, lambda event: None))
    assert outcomes["one"][0] == "one"
    assert outcomes["two"][0] == "two"
    codes = {task: end.exit_code for task, end in outcomes.items() if isinstance(end, Died)}
    assert codes == {"exit 7": 7, f"kill {int(signal.SIGSEGV)}": -signal.SIGSEGV, "exit 0": 0}


def test_the_last_process_gets_the_threads_of_those_that_ended(work, threads):
    threads(2)
    events = []
    outcomes = dict(in_processes(work, ["until it has 2 threads", "short"], 2, events.append))
    assert ("until it has 2 threads", 1) in events
    assert outcomes == {
        "until it has 2 threads": ("until it has 2 threads", 2),
        "short": ("short", 1),
    }


def test_no_process_outlives_the_iterator(work):
    outcomes = in_processes(work, ["for ever", "for ever", "short"], 3, lambda event: None)
    assert next(outcomes)[0] == "short"
    children = multiprocessing.active_children()
    outcomes.close()
    for child in children:
        child.join(timeout=60)
    assert sorted(child.exitcode for child in children)[:2] == [-signal.SIGKILL] * 2


def test_an_interrupt_loses_no_result_of_the_scan_before(hub, calibration, tmp_path):
    def on_progress(at):
        raise KeyboardInterrupt

    first = scan(hub, calibration=calibration, out=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        scan(hub, calibration=calibration, out=tmp_path / "out", on_progress=on_progress)
    third = scan(hub, calibration=calibration, out=tmp_path / "out")
    assert [result.resumed for result in third.models] == [True, False, True, True]
    for before, after in zip(first.models, third.models, strict=True):
        assert before.evidence == after.evidence
        assert after.notes.count(RESUMED) <= 1


def swap_weights(hub, out):
    shutil.rmtree(hub / "a-quiet")
    shutil.copytree(hub / "c-loud", hub / "a-quiet")


def change_noise_process(hub, out):
    file = hub / "a-quiet" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "beta_end": 0.03}))


def change_network(hub, out):
    file = hub / "a-quiet" / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "act_fn": "relu"}))


def lose_trigger(hub, out):
    (out / "a-quiet" / "trigger.safetensors").unlink()


@pytest.mark.parametrize("change", [swap_weights, change_noise_process, change_network, lose_trigger])
def test_a_model_that_changed_or_lost_its_trigger_is_scanned_again(hub, calibration, tmp_path, change):
    first = scan(hub, calibration=calibration, out=tmp_path / "out").models[0]
    change(hub, tmp_path / "out")
    again, _, loud, _ = scan(hub, calibration=calibration, out=tmp_path / "out").models
    assert not again.resumed
    assert loud.resumed
    assert (again.evidence == first.evidence) == (change is lose_trigger)
    assert (again.sha256 == first.sha256) == (change is not swap_weights)
    assert again.verdict == "backdoored" or change is not swap_weights


@pytest.mark.parametrize("difference", ["seed", "settings", "pool"])
def test_nothing_is_resumed_under_other_settings(quiet_model, calibration, tmp_path, difference):
    other = {
        "seed": calibration,
        "settings": replace(calibration, settings=replace(calibration.settings, batch=3)),
        "pool": replace(
            calibration,
            models=(
                *calibration.models[:-1],
                replace(calibration.models[-1], evidence=replace(calibration.models[-1].evidence, M_r=9.0)),
            ),
        ),
    }[difference]
    scan(quiet_model, calibration=calibration, out=tmp_path)
    (result,) = scan(quiet_model, calibration=other, seed=int(difference == "seed"), out=tmp_path).models
    assert not result.resumed


def test_a_resumed_result_is_the_one_in_the_report(quiet_model, calibration, tmp_path):
    report = scan(quiet_model, calibration=calibration, out=tmp_path)
    (model,) = report.models
    candidate = TriedCandidate("fixed-point", "ddpm", None, 0, None, "dispersed-pilots", "why")
    recorded = replace(model, candidates=(candidate, replace(candidate, scale=1.2, score=0.5, samples=8)))
    (tmp_path / "report.json").write_text(report_json(replace(report, models=(recorded,))))
    (resumed,) = resumed_results(
        tmp_path, find_checkpoints([quiet_model]), [NoiseScan(calibration)], report.tool, report.config
    ).values()
    assert replace(resumed, notes=recorded.notes) == recorded


def test_a_report_that_cannot_be_read_or_differs_in_version_is_ignored(quiet_model, calibration, tmp_path):
    report = scan(quiet_model, calibration=calibration, out=tmp_path)
    checkpoints, detectors = find_checkpoints([quiet_model]), [NoiseScan(calibration)]
    file = tmp_path / "report.json"
    content = json.loads(file.read_text())
    (model,) = content["models"]
    assert set(resumed_results(tmp_path, checkpoints, detectors, report.tool, report.config)) == {0}
    assert resumed_results(tmp_path, checkpoints, detectors, {**report.tool, "version": "0"}, report.config) == {}
    spoiled = [[], {}, None, 3, {**content, "models": 3}, {**content, "models": [3]}]
    wrong = ({"evidence": "some"}, {"verdict": "some"}, {"more": 1})
    spoiled += [{**content, "models": [{**model, **fields}]} for fields in wrong]
    for text in ("", file.read_text()[:-20], *map(json.dumps, spoiled)):
        file.write_text(text)
        assert resumed_results(tmp_path, checkpoints, detectors, report.tool, report.config) == {}


def test_jobs_are_bounded_by_threads_models_and_memory(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    for folder, size in ((small, 1000), (large, 10**9)):
        folder.mkdir()
        with (folder / "weights").open("wb") as file:
            file.truncate(size)
    assert bytes_on_disk(small) == bytes_on_disk(small / "weights") == 1000
    need = memory_of(10**9)
    assert need > memory_of(1000) > 10**8
    for free, models, expected in (
        (100 * need, [small] * 2, 2),
        (100 * need, [small] * 9, 3),
        (100 * need, [], 1),
        (2 * need, [small] * 8 + [large], 2),
        (2 * need - 1, [large, small, small], 1),
        (0, [small] * 9, 1),
    ):
        assert jobs_that_fit(models, most=3, free=free) == expected


@pytest.mark.skipif(torch.cuda.is_available() or sys.platform != "linux", reason="asks the system for its memory, not a GPU")
def test_jobs_on_this_machine_are_those_of_its_threads_and_memory(tmp_path, threads):
    threads(3)
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    assert default_jobs([tmp_path / "huge"] * 9) == 1
    assert 1 <= default_jobs([tmp_path / "absent"] * 9) <= 3
    threads(1)
    assert default_jobs([tmp_path / "absent"] * 9) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_free_memory_is_part_of_the_machines_memory():
    assert 0 < free_memory() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_jobs_below_one(tmp_path):
    with pytest.raises(ValueError, match="at least 1, not 0"):
        scan(tmp_path, jobs=0)
