"""One scan: load, revert, judge and record every model."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from seal_fast.checkpoints import CheckpointError, LoadedCheckpoint, load_denoiser
from seal_fast.checkpoints.trigger import PRIOR_SCALE
from seal_fast.diffusion import Denoiser, Trigger
from seal_fast.noise_triggers import (
    DEFAULT_PRESET,
    Calibration,
    Reversion,
    Settings,
    Verdict,
    model_evidence,
    reverse_trigger,
    shipped_calibration,
)
from seal_fast.noise_triggers.probe import Probe
from seal_fast.report.figures import draw_samples, draw_trigger
from seal_fast.report.json import write_report
from seal_fast.results.environment import environment, tool
from seal_fast.results.progress import OnProgress, Progress
from seal_fast.results.scan import ModelResult, ScanReport
from seal_fast.workflows.capacity import default_jobs
from seal_fast.workflows.discovery import Candidate, find_candidates
from seal_fast.workflows.processes import Died, in_processes
from seal_fast.workflows.resume import resumed_results
from seal_fast.workflows.streams import on_streams

IMAGES = 4
IMAGE_STEPS = 100
"""Ancestral steps, as many as the default search tests its candidates with."""


OnResult = Callable[[ModelResult, int, int], None]
"""Called with each finished row, how many are finished with it, and the models to scan."""


def _ignore(*_: object) -> None:
    pass


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def progress_of(settings: Settings, at: Progress, on_progress: OnProgress) -> Callable[[str, int, int, float], None]:
    """A reversion callback that turns iterations into the share of the work, counted in denoised images."""
    whole = sum(stage.iterations * stage.images for stage in settings.stages)
    before, starts = 0, {}
    for stage in settings.stages:
        starts[stage.name] = before, stage.iterations * stage.images
        before += stage.iterations * stage.images

    def on_step(stage: str, iteration: int, iterations: int, loss: float) -> None:
        start, images = starts[stage]
        fraction = (start + images * iteration / iterations) / whole
        on_progress(replace(at, stage=stage, iteration=iteration, iterations=iterations, fraction=fraction))

    return on_step


@dataclass(frozen=True)
class _Task:
    """A checkpoint and its place in the report, from 0."""

    place: int
    candidate: Candidate


@dataclass(frozen=True)
class _Scan:
    """What stays the same from model to model."""

    calibration: Calibration
    weights: str
    seed: int
    out: Path | None
    total: int

    def each(self, waiting: Sequence[_Task], jobs: int, on_progress: OnProgress) -> Iterator[tuple[int, ModelResult]]:
        """The place and the row of every model, as they finish; a single one is scanned here, with all threads."""
        if jobs == 1 or len(waiting) == 1:
            for task in waiting:
                yield task.place, self.model(task, on_progress)
            return
        if default_device() == "cuda":
            for task, row in on_streams(self.model, waiting, jobs, on_progress):
                yield task.place, row
            return
        for task, outcome in in_processes(self.model, waiting, jobs, on_progress):
            yield task.place, _lost(task.candidate, outcome) if isinstance(outcome, Died) else outcome

    def model(self, task: _Task, on_progress: OnProgress) -> ModelResult:
        """Scan one checkpoint; whatever goes wrong with it becomes its error row."""
        started = time.perf_counter()
        candidate = task.candidate
        at = Progress(candidate.name, task.place + 1, self.total, "loading")
        on_progress(at)
        loaded = None
        try:
            loaded = load_denoiser(candidate.path, weights=self.weights, device=default_device())
            on_step = progress_of(self.calibration.settings, at, on_progress)
            reversion = reverse_trigger(loaded.denoiser, self.calibration.settings, seed=self.seed, on_step=on_step)
            evidence = model_evidence(reversion)
            judgement = self.calibration.judge(evidence, loaded.denoiser.kind)
        except Exception as error:
            return _failed(candidate, loaded, _describe(error, candidate), time.perf_counter() - started)
        on_progress(replace(at, stage="images", fraction=1.0))
        trigger, notes = self.keep(candidate, loaded.denoiser, reversion, loaded.sha256)
        return ModelResult(
            path=candidate.name,
            sha256=loaded.sha256,
            format=loaded.format,
            verdict=judgement.verdict,
            score=judgement.score,
            threshold=judgement.threshold,
            reason=judgement.reason,
            evidence=evidence,
            trigger=trigger,
            seconds=time.perf_counter() - started,
            error=None,
            notes=(*loaded.notes, *notes),
        )

    def keep(
        self, candidate: Candidate, denoiser: Denoiser, reversion: Reversion, sha256: str
    ) -> tuple[str | None, tuple[str, ...]]:
        """Write the trigger and its images; returns the trigger's path below `out`, and notes."""
        if self.out is None or not reversion.finite:
            return None, ()
        folder = self.out / candidate.name
        kept = None
        try:
            metadata = {PRIOR_SCALE: repr(denoiser.process.prior_scale), "model_sha256": sha256}
            reversion.trigger.save(folder / "trigger.safetensors", metadata)
            kept = f"{candidate.name}/trigger.safetensors"
            draw_trigger(reversion.trigger, folder / "trigger.png")
            draw_samples(
                sample_images(denoiser, reversion.trigger, self.seed, reversion.sampler or "ddpm"), folder / "samples.png"
            )
        except Exception as error:
            # the verdict stands without its images, and a full disk must not hide a backdoor
            return kept, (f"trigger or images not kept: {_describe(error, candidate)}",)
        return kept, ()


def sample_images(denoiser: Denoiser, trigger: Trigger, seed: int, sampler: str = "ddpm") -> dict[str, torch.Tensor]:
    """A few images per kind of start, [N,C,H,W] each, all from the same noise: what the trigger changes is the backdoor."""
    noise = torch.randn(IMAGES, *denoiser.shape, generator=torch.Generator().manual_seed(seed)).to(denoiser.device)

    def draw(start: torch.Tensor) -> torch.Tensor:
        return Probe(denoiser, seed + 1, half_precision=True).sampler(sampler, IMAGE_STEPS).draw(start).cpu()

    return {"clean noise": draw(noise), "noise with the reverted trigger": draw(trigger.start(noise))}


def _failed(candidate: Candidate, loaded: LoadedCheckpoint | None, reason: str, seconds: float) -> ModelResult:
    sha256, kind = (loaded.sha256, loaded.format) if loaded else (None, None)
    return ModelResult(candidate.name, sha256, kind, Verdict.ERROR, None, None, reason, None, None, seconds, reason)


def _lost(candidate: Candidate, end: Died) -> ModelResult:
    code = end.exit_code
    if code is not None and code < 0:
        reason = f"its process was killed by signal {-code} ({signal.strsignal(-code)})"
        if -code == signal.SIGKILL:
            reason += ", as the system does when memory runs out: scan it alone, or with fewer --jobs"
    else:
        reason = f"its process ended with exit code {code} and no result: scan it alone to see why"
    return _failed(candidate, None, reason, end.seconds)


def _describe(error: Exception, candidate: Candidate) -> str:
    """An error in one line, without the absolute path reports must not hold."""
    if isinstance(error, CheckpointError):
        part = os.path.relpath(error.path, candidate.path)
        text = error.reason if part == "." else f"{part}: {error.reason}"
    else:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return text.replace(os.fspath(candidate.path), candidate.name)


def _config(calibration: Calibration, preset: str | None, weights: str, seed: int) -> dict[str, Any]:
    backdoored = sum(model.backdoored for model in calibration.models)
    digest = hashlib.sha256(json.dumps(asdict(calibration), sort_keys=True).encode()).hexdigest()
    return {
        "preset": preset,
        "settings": asdict(calibration.settings),
        "calibration": {"benign": len(calibration.models) - backdoored, "backdoored": backdoored, "sha256": digest},
        "weights": weights,
        "seed": seed,
        "device": default_device(),
    }


def scan(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    preset: str = DEFAULT_PRESET,
    calibration: Calibration | None = None,
    weights: str = "ema",
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    jobs: int | None = 1,
    on_progress: OnProgress = _ignore,
    on_result: OnResult = _ignore,
) -> ScanReport:
    """EffectDetector every checkpoint at or below `paths`.

    Args:
        paths: checkpoints, or folders that hold some at any depth.
        preset: which shipped calibration to judge by, a key of `seal_fast.noise_triggers.PRESETS`; unused if `calibration` is
            given.
        calibration: what to judge by; reversion takes its settings from it, since scores compare only under equal settings.
        weights: "ema" or "raw", where a checkpoint holds both.
        seed: of the reversion and of the images.
        out: folder for report.json, and for each model's trigger.safetensors, trigger.png and samples.png; None keeps nothing.
            report.json is replaced whole after every model, so an interrupted scan leaves the finished ones; the next one with
            equal settings keeps the rows of models whose weights did not change, errors excepted.
        jobs: models scanned at a time. 1 scans one after the other, here; more give each a process of its own with its share of
            torch's threads, where one that dies costs one `error` row, and programs that ask for it need the guard
            `if __name__ == "__main__":` of Python's multiprocessing. On a GPU each is scanned in a thread of this process, on a
            stream of its own. None takes as many as `capacity.default_jobs` allows.
        on_progress: called as the work goes on.
        on_result: called with every finished row.

    Returns:
        One row per checkpoint, in the order found whatever finished first; a checkpoint that cannot be scanned gets an `error`
        row and the rest goes on.

    Raises:
        FileNotFoundError: one of `paths` does not exist, or there is no such preset.
        OSError: `out` cannot be written.
        ValueError: the preset's calibration cannot be read, or `jobs` is less than 1.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, not {jobs}")
    used_preset = preset if calibration is None else None
    calibration = calibration or shipped_calibration(preset)
    candidates = find_candidates([paths] if isinstance(paths, str | os.PathLike) else paths)
    out = None if out is None else Path(out)
    config = _config(calibration, used_preset, weights, seed)
    rows = {} if out is None else resumed_results(out, candidates, tool(), config)
    waiting = [_Task(place, candidate) for place, candidate in enumerate(candidates) if place not in rows]
    report = ScanReport(tuple(rows.values()), tool(), environment(), config)
    if out is not None:
        write_report(report, out / "report.json")
    for number, row in enumerate(rows.values(), 1):
        on_result(row, number, len(candidates))
    jobs = default_jobs([task.candidate.path for task in waiting]) if jobs is None else jobs
    for place, row in _Scan(calibration, weights, seed, out, len(candidates)).each(waiting, jobs, on_progress):
        rows[place] = row
        report = replace(report, models=tuple(rows[place] for place in sorted(rows)))
        if out is not None:
            write_report(report, out / "report.json")
        on_result(row, len(rows), len(candidates))
    return report
