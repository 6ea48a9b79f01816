"""One sealing: load, measure, train, measure again, write."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from seal_fast.checkpoints import CheckpointError, load_denoiser
from seal_fast.checkpoints.save import check_target, save_network, whole_folder
from seal_fast.checkpoints.trigger import load_trigger
from seal_fast.diffusion import Denoiser, Trigger
from seal_fast.noise_triggers.activation_test import collapse
from seal_fast.noise_triggers.evaluation import CLEAN, clean_drift, draw_starts, image_drawn
from seal_fast.noise_triggers.unlearning import NoiseUnlearnSettings, seal
from seal_fast.report.figures import draw_samples
from seal_fast.report.json import unlearn_json
from seal_fast.report.model_card import noise_unlearn_card
from seal_fast.results.environment import environment, tool
from seal_fast.results.progress import OnProgress, Progress
from seal_fast.results.unlearning import NoiseUnlearnReport, Removal
from seal_fast.workflows.capacity import default_device

IMAGES = 8
IMAGE = "before_after_{}.png"
"""Name of a trigger's image, numbered in the order given."""


def read_triggers(files: Sequence[Path], shape: tuple[int, int, int]) -> list[Trigger]:
    """The triggers of some files.

    Raises:
        CheckpointError: a file is no trigger, or its trigger has another shape than the model's images.
    """
    triggers = [load_trigger(file) for file in files]
    for file, trigger in zip(files, triggers, strict=True):
        if trigger.mu.shape != shape:
            raise CheckpointError(file, f"a trigger of shape {list(trigger.mu.shape)} does not fit the model's {list(shape)}")
    return triggers


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device where it is a GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # kilobytes, except on macOS
    return peak if sys.platform == "darwin" else peak * 1024


def _measure(denoiser: Denoiser, triggers: Sequence[Trigger], seed: int) -> list[dict[str, torch.Tensor]]:
    return [draw_starts(denoiser, trigger, seed=seed) for trigger in triggers]


def _removal(
    files: Sequence[Path], before: list[dict[str, torch.Tensor]], after: list[dict[str, torch.Tensor]]
) -> list[Removal]:
    return [
        Removal(file.name, sampler, collapse(old[sampler], old[CLEAN]), collapse(new[sampler], new[CLEAN]))
        for file, old, new in zip(files, before, after, strict=True)
        for sampler in old
        if sampler != CLEAN
    ]


def _draw(before: list[dict[str, torch.Tensor]], after: list[dict[str, torch.Tensor]], folder: Path) -> None:
    for number, (old, new) in enumerate(zip(before, after, strict=True), 1):
        rows = {f"before: {name}": images[:IMAGES] for name, images in old.items()}
        rows |= {f"after: {name}": images[:IMAGES] for name, images in new.items()}
        draw_samples(rows, folder / IMAGE.format(number))


def unlearn_noise(
    model: Path,
    noise_triggers: Sequence[Path],
    out: Path,
    *,
    settings: NoiseUnlearnSettings | None = None,
    weights: str = "ema",
    seed: int = 0,
    on_progress: OnProgress = lambda at: None,
) -> NoiseUnlearnReport:
    """Seal one checkpoint into a new folder that stock diffusers loads.

    Args:
        model: the poisoned checkpoint, anything `load_denoiser` takes.
        noise_triggers: trigger files of a scan, to train against and to measure before and after.
        out: folder for the sealed checkpoint, report.json, README.md and images; appears whole or not at all.
        settings: of the training.
        weights: "ema" or "raw", where a checkpoint holds both.
        seed: of the training and of all samples.
        on_progress: called as the work goes on.

    Raises:
        CheckpointError: the model, a trigger or `out` is refused.
        FloatingPointError: the training diverged.
        OSError: `out` cannot be written.
    """
    started = time.perf_counter()
    settings = settings or NoiseUnlearnSettings()
    check_target(out, model)
    at = Progress(model.name, 1, 1, "loading")
    on_progress(at)
    loaded = load_denoiser(model, weights=weights, device=default_device())
    triggers = read_triggers(noise_triggers, loaded.denoiser.shape)

    on_progress(replace(at, stage="measuring before"))
    before = _measure(loaded.denoiser, triggers, seed)

    def on_step(stage: str, iteration: int, iterations: int, loss: float) -> None:
        share = iteration / iterations if stage == "training" else 0.0
        on_progress(replace(at, stage=stage, iteration=iteration, iterations=iterations, fraction=0.1 + 0.8 * share))

    targets = [image for image in map(image_drawn, before) if image is not None]
    sealed = seal(loaded.denoiser, triggers, settings, targets=targets, seed=seed, on_step=on_step)
    on_progress(replace(at, stage="measuring after", fraction=0.9))
    after = _measure(sealed.denoiser, triggers, seed)
    report = NoiseUnlearnReport(
        model=model.name,
        sha256=loaded.sha256,
        format=loaded.format,
        removal=tuple(_removal(noise_triggers, before, after)),
        clean_drift=clean_drift(loaded.denoiser, sealed.denoiser, seed=seed),
        steps=sealed.steps,
        seconds=time.perf_counter() - started,
        training_seconds=sealed.seconds,
        peak_memory_bytes=peak_memory(loaded.denoiser.device),
        tool=tool(),
        environment=environment(),
        config={"settings": asdict(settings), "weights": weights, "seed": seed, "device": default_device()},
        notes=loaded.notes,
    )
    with whole_folder(out) as folder:
        save_network(sealed.denoiser.network, model, folder)
        _draw(before, after, folder)
        (folder / "report.json").write_text(unlearn_json(report) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(noise_unlearn_card(report), encoding="utf-8")
    return report
