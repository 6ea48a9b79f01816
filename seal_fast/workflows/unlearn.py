"""Unlearn a backdoor: the same seven steps for text triggers and for noise triggers."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from seal_fast.checkpoints.card import CARD, card_text
from seal_fast.checkpoints.save import check_target, whole_folder
from seal_fast.report.json import REPORT, unlearn_json
from seal_fast.report.model_card import unlearn_card
from seal_fast.results.environment import environment, tool
from seal_fast.results.progress import OnProgress, Progress
from seal_fast.results.text_unlearning import TextUnlearnReport
from seal_fast.results.unlearning import NoiseUnlearnReport, UnlearnRun
from seal_fast.text_triggers import TextTrigger
from seal_fast.training import OnStep, quiet
from seal_fast.workflows.found import NoiseTriggers, TextTriggers, read_found
from seal_fast.workflows.unlearn_noise import NoiseUnlearning
from seal_fast.workflows.unlearn_text import TextUnlearning


class UnlearningRequest(Protocol):
    """The parts of an unlearning in which `TextUnlearning` and `NoiseUnlearning` differ.

    Every step gets what the earlier ones returned, whose types are the request's own. It may raise CheckpointError for a file
    that it refuses, and ValueError for a request that does not fit the model.
    """

    @property
    def model(self) -> Any:
        """Path of the poisoned checkpoint, or a model in memory."""

    @property
    def out(self) -> str | os.PathLike[str] | None:
        """New folder for the unlearned checkpoint and its report; None writes nothing."""

    @property
    def shares(self) -> Mapping[str, float]:
        """Every stage that the run reports, in order, with its share of the time."""

    def check(self) -> None:
        """Refuse, before the model is loaded, what can be refused by then."""

    def load(self) -> Any: ...

    def measure_before(self, loaded: Any) -> Any: ...

    def train(self, loaded: Any, before: Any, on_step: OnStep) -> Any: ...

    def measure_after(self, loaded: Any, before: Any, trained: Any, on_step: OnStep) -> Any: ...

    def report(
        self, run: UnlearnRun, loaded: Any, before: Any, trained: Any, after: Any
    ) -> NoiseUnlearnReport | TextUnlearnReport: ...

    def write(self, folder: Path, loaded: Any, before: Any, trained: Any, after: Any) -> None:
        """Write the unlearned checkpoint and its images."""

    def unlearned(self, trained: Any) -> Any:
        """The unlearned model."""


@dataclass(frozen=True)
class UnlearnResult:
    """An unlearned model.

    Attributes:
        model: the unlearned model: a pipeline, which shares its untouched modules with a given one, or a `Denoiser`.
        report: what was done and measured.
    """

    model: Any
    report: NoiseUnlearnReport | TextUnlearnReport


def unlearn(
    model: Any,
    triggers: Iterable[Any] = (),
    out: str | os.PathLike[str] | None = None,
    *,
    found: str | os.PathLike[str] | None = None,
    on_progress: OnProgress = quiet,
    **options: Any,
) -> UnlearnResult:
    """Unlearn the backdoor of a model: text triggers of a text-to-image model, or noise triggers of an unconditional one.

    Args:
        model: path of the poisoned checkpoint, or a model in memory, which stays as it is.
        triggers: texts (str or `TextTrigger`), or noise triggers (`Trigger`, or the `pathlib.Path` of a trigger.safetensors).
            Without any, random shifts of the noise are unlearned.
        out: new folder for the unlearned checkpoint, report.json, README.md and images. It appears whole or not at all. None
            writes nothing.
        found: folder of a scanned model, DIR/<model> of a scan; its triggers are unlearned. Not with `triggers`.
        on_progress: called as the work goes on.
        options: the other fields of `TextUnlearning` for texts, and of `NoiseUnlearning` else. `run_unlearning` takes one of
            these requests itself, which type checkers can follow.

    Raises:
        CheckpointError: the model, `found`, a trigger file or `out` is refused.
        FloatingPointError: the training diverged.
        OSError: `out` cannot be written.
        TypeError: an option that the request does not have.
        ValueError: triggers or options do not fit the model or each other.
    """
    given = tuple(triggers)
    if found is not None:
        if given:
            raise ValueError("found names the triggers: leave triggers out")
        match read_found(Path(found)):
            case TextTriggers(texts, positions, words, sha256, module):
                from_scan = {"positions": positions, "needed_words": words, "scanned_sha256": sha256, "scanned_module": module}
                options = from_scan | options
                return run_unlearning(TextUnlearning(model, texts, out, **options), on_progress)
            case NoiseTriggers(files, scanned):
                options = {"scanned_sha256": scanned} | options
                return run_unlearning(NoiseUnlearning(model, files, out, **options), on_progress)
    with_text = [isinstance(trigger, str | TextTrigger) for trigger in given]
    if any(with_text) and not all(with_text):
        raise ValueError("text triggers and noise triggers belong to different models: unlearn them separately")
    if isinstance(triggers, str) or any(isinstance(one, str) and one.endswith(".safetensors") for one in given):
        raise ValueError("triggers must be a list; a str in it is a text trigger, so name trigger files by pathlib.Path")
    if any(with_text):
        return run_unlearning(TextUnlearning(model, given, out, **options), on_progress)
    return run_unlearning(NoiseUnlearning(model, given, out, **options), on_progress)


def run_unlearning(request: UnlearningRequest, on_progress: OnProgress = quiet) -> UnlearnResult:
    """Carry out a request: check, load, measure before, train, measure after, report, write. Raises what `unlearn` does."""
    started = time.perf_counter()
    check_request(request)
    name = model_name(request.model)
    on_step = _stage_progress(name, request.shares, on_progress)

    on_step("loading", 0, 0, math.nan)
    loaded = request.load()
    on_step("measuring before", 0, 0, math.nan)
    before = request.measure_before(loaded)
    training_started = time.perf_counter()
    trained = request.train(loaded, before, on_step)
    training_seconds = time.perf_counter() - training_started
    on_step("measuring after", 0, 0, math.nan)
    after = request.measure_after(loaded, before, trained, on_step)
    run = UnlearnRun(
        model=name,
        seconds=time.perf_counter() - started,
        training_seconds=training_seconds,
        peak_memory_bytes=peak_memory(),
        tool=tool(),
        environment=environment(),
    )
    report = request.report(run, loaded, before, trained, after)
    if request.out is not None:
        on_step("writing", 0, 0, math.nan)
        with whole_folder(Path(request.out)) as folder:
            request.write(folder, loaded, before, trained, after)
            (folder / REPORT).write_text(unlearn_json(report) + "\n", encoding="utf-8")
            (folder / CARD).write_text(unlearn_card(report, card_text(Path(request.model))), encoding="utf-8")
    return UnlearnResult(request.unlearned(trained), report)


def check_request(request: UnlearningRequest) -> None:
    """Refuse a request that cannot be carried out, before its model is loaded.

    Raises:
        CheckpointError: `out` or a trigger file is refused.
        ValueError: the request is wrong in another way.
    """
    if request.out is not None:
        if not isinstance(request.model, str | os.PathLike):
            raise ValueError("out needs the path of a checkpoint as model: a model in memory has no files to copy")
        check_target(Path(request.out), Path(request.model))
    request.check()


def model_name(model: Any) -> str:
    """Name of a checkpoint, or of the class of a model in memory."""
    return Path(model).name if isinstance(model, str | os.PathLike) else type(model).__name__


def peak_memory() -> int:
    """Peak memory in bytes: of the GPU if one was used, else of the process."""
    if torch.cuda.is_available() and (used := torch.cuda.max_memory_allocated()) > 0:
        return used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # kilobytes, except on macOS
    return peak if sys.platform == "darwin" else peak * 1024


def _stage_progress(model: str, shares: Mapping[str, float], on_progress: OnProgress) -> Callable[[str, int, int, float], None]:
    """Turn a stage and its iteration into the finished share of the run."""
    begins = dict(zip(shares, _sums(shares.values()), strict=True))

    def on_step(stage: str, iteration: int, iterations: int, loss: float) -> None:
        fraction = begins[stage] + (shares[stage] * iteration / iterations if iterations else 0.0)
        on_progress(Progress(model, 1, 1, stage, iteration, iterations, fraction))

    return on_step


def _sums(values: Iterable[float]) -> list[float]:
    """Sum of the values before each one."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return sums[:-1]
