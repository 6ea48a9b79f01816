"""A dry run of a scan: how many UNet evaluations it would make, and how long they would take. Nothing is searched."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any

import torch

from seal_fast.results.environment import tool
from seal_fast.results.plan import PlannedSearch, PlannedStage, ScanPlan
from seal_fast.text_to_image.generation import batch_size, starting_noise
from seal_fast.text_to_image.latents import noise_schedule, predict
from seal_fast.text_to_image.precision import Precision, autocast
from seal_fast.text_to_image.prompts import encode
from seal_fast.text_triggers.search import stages
from seal_fast.workflows.capacity import default_device
from seal_fast.workflows.discovery import Checkpoint, find_checkpoints
from seal_fast.workflows.error_text import in_one_line
from seal_fast.workflows.text_scan import TextScan


def plan_scan(paths: Iterable[str | os.PathLike[str]], detector: TextScan) -> ScanPlan:
    """Plan the search of every text-to-image model at or below `paths`.

    Args:
        paths: checkpoints, or folders that hold some at any depth.
        detector: its settings, budget and base.

    Raises:
        FileNotFoundError: a path does not exist.
    """
    checkpoints = find_checkpoints(paths)
    accepted = [checkpoint for checkpoint in checkpoints if detector.accepts(checkpoint.path)]
    searches = tuple(_plan(checkpoint, detector) for checkpoint in accepted)
    return ScanPlan(searches, len(checkpoints) - len(accepted), tool())


def _plan(checkpoint: Checkpoint, detector: TextScan) -> PlannedSearch:
    """The plan for one model; any exception becomes its error."""
    try:
        model = detector.load(checkpoint.path, default_device()).model
        pipeline = model.pipeline
        planned = tuple(
            PlannedStage(stage.name, stage.iterations * stage.images)
            for stage in stages(pipeline, model.prompts, detector.settings, model.base is not None)
        )
        batch = batch_size(pipeline)
        batch_seconds = measured_batch(pipeline, batch, detector.settings.precision)
    except Exception as error:
        return PlannedSearch(checkpoint.name, error=in_one_line(error, checkpoint))
    budget = detector.budget
    evaluations = sum(stage.evaluations for stage in planned)
    if budget.evaluations is not None:
        evaluations = min(evaluations, budget.evaluations)
    seconds = evaluations * batch_seconds / batch
    if budget.seconds is not None and seconds > budget.seconds:
        evaluations, seconds = int(evaluations * budget.seconds / seconds), budget.seconds
    return PlannedSearch(checkpoint.name, planned, evaluations, seconds, batch, batch_seconds)


@torch.no_grad()
def measured_batch(pipeline: Any, batch: int, precision: Precision) -> float:
    """Seconds that the UNet takes for a batch of noise at the noisiest timestep, after one that is not measured."""
    noise = starting_noise(pipeline, batch, seed=0).to(pipeline.device)
    timesteps = torch.full((batch,), noise_schedule(pipeline).num_timesteps - 1, device=pipeline.device)
    with autocast(pipeline.device, precision):
        texts = encode(pipeline, [""]).expand(batch, -1, -1)
        for _ in range(2):
            started = time.perf_counter()
            # copied to the CPU, which waits for a GPU
            predict(pipeline.unet, noise, timesteps, texts).cpu()
            seconds = time.perf_counter() - started
    return seconds
