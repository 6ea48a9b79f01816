"""What a dry run of a scan plans. `seal_fast.workflows.dry_run` makes it; reports only read it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a search.

    Attributes:
        name: its name.
        evaluations: UNet evaluations of one latent, at most.
    """

    name: str
    evaluations: int


@dataclass(frozen=True)
class PlannedSearch:
    """The search for text triggers that a scan of one model would make.

    Attributes:
        path: path of the checkpoint, relative to the scanned root.
        stages: in their order.
        evaluations: UNet evaluations of one latent, no more than the budget allows; None after an error.
        seconds: time of these evaluations, from one measured batch, no more than the budget allows; None after an error.
        batch: latents of the measured batch; None after an error.
        batch_seconds: the time that it took; None after an error.
        error: why the model cannot be loaded; None if it can.
    """

    path: str
    stages: tuple[PlannedStage, ...] = ()
    evaluations: int | None = None
    seconds: float | None = None
    batch: int | None = None
    batch_seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class ScanPlan:
    """What a dry run plans.

    Attributes:
        searches: one per text-to-image model, in the order they were found.
        others: number of other models, whose searches are not planned.
        tool: name and version of seal-fast.
    """

    searches: tuple[PlannedSearch, ...]
    others: int
    tool: dict[str, str]
