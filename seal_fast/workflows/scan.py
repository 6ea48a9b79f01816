"""Scan many models: find the checkpoints, resume an earlier scan, scan the rest, and write the report after every model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from seal_fast.noise_triggers import DEFAULT_PRESET, Calibration, shipped_calibration
from seal_fast.report.json import REPORT, write_report
from seal_fast.results.environment import environment, tool
from seal_fast.results.progress import OnProgress
from seal_fast.results.scan import ModelResult, ScanReport
from seal_fast.text_triggers.search_settings import Budget, TextSearchSettings
from seal_fast.training import quiet
from seal_fast.workflows.capacity import default_device, default_jobs
from seal_fast.workflows.detector import accepting
from seal_fast.workflows.discovery import find_checkpoints
from seal_fast.workflows.noise_scan import NoiseScan
from seal_fast.workflows.processes import Died, in_processes
from seal_fast.workflows.resume import resumed_results
from seal_fast.workflows.scan_model import ModelScan, Task, lost_result
from seal_fast.workflows.streams import on_streams
from seal_fast.workflows.text_scan import TextScan

OnResult = Callable[[ModelResult, int, int], None]
"""Called with each result, how many models have one by now, and the number of models."""


def scan(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    preset: str = DEFAULT_PRESET,
    calibration: Calibration | None = None,
    weights: str = "ema",
    base: str | os.PathLike[str] | None = None,
    prompts: Sequence[str] | None = None,
    text_settings: TextSearchSettings | None = None,
    budget: Budget | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    jobs: int | None = 1,
    on_progress: OnProgress = quiet,
    on_result: OnResult = quiet,
) -> ScanReport:
    """Decide for every checkpoint at or below `paths` whether it is backdoored.

    Unconditional models are searched for noise triggers, text-to-image models for text triggers.

    Args:
        paths: checkpoints, or folders that hold some at any depth.
        preset: for unconditional models, shipped calibration to use, a key of `seal_fast.noise_triggers.PRESETS`; unused if
            `calibration` is given.
        calibration: decides, and gives the reversion its settings, since scores compare under equal settings only.
        weights: "ema" or "raw", where a checkpoint holds both.
        base: for text-to-image models, folder of the clean pipeline that a UNet or a text encoder alone belongs to.
        prompts: for text-to-image models, clean prompts; every other one is held out. None takes those of the model card if it
            has at least `prompts.FEWEST_CAPTIONS`, else general ones that come with seal-fast.
        text_settings: settings of the search for text triggers.
        budget: where a search for text triggers ends before it is complete; None for no limit.
        seed: seed of the searches and of the images.
        out: folder for report.json, triggers and images; None keeps nothing. report.json is replaced whole after every model,
            and a scan into the same folder resumes from it (see `seal_fast.workflows.resume`). Once the first model is scanned,
            a report that cannot be written costs a warning only.
        jobs: models at a time. With 1, this process scans them one after the other. With more, each model gets a process of its
            own, and the processes share torch's threads. A process that dies costs one `error` result. A program that scans so
            needs Python's guard `if __name__ == "__main__":`. On a GPU each model gets a thread and a CUDA stream instead. None
            takes `seal_fast.workflows.capacity.default_jobs`.
        on_progress: called as the work goes on.
        on_result: called with every result, resumed ones first.

    Returns:
        One result per checkpoint, in the order found. A checkpoint that cannot be scanned has the verdict `error`.

    Raises:
        FileNotFoundError: one of `paths` does not exist, or there is no such preset.
        OSError: `out` cannot be written.
        ValueError: the preset's calibration cannot be read, or `jobs` is less than 1.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, not {jobs}")
    out = None if out is None else Path(out)
    used_preset = preset if calibration is None else None
    detectors = (
        TextScan(
            None if base is None else Path(base),
            None if prompts is None else tuple(prompts),
            text_settings or TextSearchSettings(),
            budget or Budget(),
            seed,
        ),
        # the last one, since it accepts every checkpoint
        NoiseScan(calibration or shipped_calibration(preset), weights, seed, used_preset),
    )
    config: dict[str, Any] = {"seed": seed, "device": default_device(), **{one.name: one.config for one in detectors}}
    checkpoints = find_checkpoints([paths] if isinstance(paths, str | os.PathLike) else paths)
    scan_model = ModelScan(detectors, out, len(checkpoints))
    results = {} if out is None else resumed_results(out, checkpoints, detectors, tool(), config)
    waiting = [(place, checkpoint) for place, checkpoint in enumerate(checkpoints) if place not in results]
    report = ScanReport(tuple(results.values()), tool(), environment(), config)
    if out is not None:
        write_report(report, out / REPORT)
    for number, result in enumerate(report.models, 1):
        on_result(result, number, len(checkpoints))
    for place, result in _scan_waiting(scan_model, waiting, jobs, on_progress):
        results[place] = result
        report = _written(replace(report, models=tuple(results[place] for place in sorted(results))), out)
        on_result(result, len(results), len(checkpoints))
    return report


def _written(report: ScanReport, out: Path | None) -> ScanReport:
    """The report, written if it can be. A disk that has become full or read-only costs the file, not the verdicts."""
    if out is not None:
        try:
            write_report(report, out / REPORT)
        except OSError as error:
            warnings.warn(f"{out / REPORT} cannot be written, the scan goes on: {error.strerror}", RuntimeWarning, stacklevel=3)
    return report


def _scan_waiting(
    one: ModelScan, waiting: Sequence[Task], jobs: int | None, on_progress: OnProgress
) -> Iterator[tuple[int, ModelResult]]:
    """Place and result of every model, as they finish. A single model is scanned here, with all threads."""
    jobs = jobs or default_jobs([checkpoint.path for _, checkpoint in waiting])
    if jobs == 1 or len(waiting) == 1:
        for task in waiting:
            yield task[0], one(task, on_progress)
    elif default_device() == "cuda":
        for task, result in on_streams(one, waiting, jobs, on_progress):
            yield task[0], result
    else:
        for (place, checkpoint), outcome in in_processes(one, waiting, jobs, on_progress):
            if isinstance(outcome, Died):
                outcome = lost_result(checkpoint, accepting(one.detectors, checkpoint.path).name, outcome)
            yield place, outcome
