"""Candidates that a search proposes, the results of their tests, and the result of the whole search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from seal_fast.checkpoints.trigger import Trigger


class Origin(StrEnum):
    """The proposer of a candidate."""

    NO_TRIGGER = "no-trigger"
    FIXED_POINT = "fixed-point"
    TARGET_REFINEMENT = "target-refinement"
    JOINT_INVERSION = "joint-inversion"


class Outcome(StrEnum):
    """Why the search ended with a candidate, or left it."""

    ACCEPTED = "accepted"
    DISPERSED_PILOTS = "dispersed-pilots"
    NO_ACTIVE_SCALE = "no-active-scale"
    REJECTED = "rejected"
    UNDECIDED = "undecided"
    NO_TRIGGER = "no-trigger"

    @property
    def sentence(self) -> str:
        return _SENTENCES[self]


_SENTENCES = {
    Outcome.ACCEPTED: "The trigger makes the samples so similar that the search ended with it.",
    Outcome.DISPERSED_PILOTS: "The pilot samples vary too much at every scale.",
    Outcome.NO_ACTIVE_SCALE: "With more samples than the pilots, the samples vary too much at every scale.",
    Outcome.REJECTED: "The samples vary hardly less than without the trigger.",
    Outcome.UNDECIDED: "The samples vary less than without the trigger, but not by enough to end the search.",
    Outcome.NO_TRIGGER: "There is no fixed point; without a trigger the score is 1 by definition.",
}


@dataclass(frozen=True)
class Candidate:
    """A trigger to test.

    Attributes:
        mu: shift [C,H,W].
        gamma: noise scale [C,H,W].
        loss: residual per dimension that the proposer ended with: the variance of the denoiser's error in eps at a fixed point,
            or the attacker's training loss; NaN if the proposer has no loss.
        origin: its proposer.
        sampler: name in `seal_fast.diffusion.SAMPLERS` of the sampler that it is tested with.
        accept_above: the search ends with it if its score exceeds this.
        scales: multiples of mu among which pilot samples choose one; without any it is measured as it is.
    """

    mu: Tensor
    gamma: Tensor
    loss: float
    origin: Origin
    sampler: str
    accept_above: float
    scales: tuple[float, ...] = ()

    def trigger(self, scale: float = 1.0) -> Trigger:
        return Trigger(scale * self.mu, self.gamma)

    @property
    def strength(self) -> float:
        """Power of mu over the loss, by which fixed points are ordered."""
        return float(self.mu.square().mean()) / max(self.loss, 1e-12)

    @property
    def gamma_at_mu(self) -> float:
        """Mean of gamma where mu acts, weighted by the power of mu."""
        return float((self.mu.square() * self.gamma).sum() / self.mu.square().sum())

    @property
    def changes_nothing(self) -> bool:
        """Whether the trigger leaves every noise as it is."""
        return not bool(self.mu.any()) and bool(torch.all(self.gamma == 1))


@dataclass(frozen=True)
class Consensus:
    """The image [C,H,W] that a candidate's most similar pilot samples agree on, their score, and their median scale."""

    image: Tensor
    score: float
    scale: float


@dataclass(frozen=True)
class TestResult:
    """What the activation test says about a candidate.

    Attributes:
        candidate: what was tested.
        outcome: why the search ended with it, or left it.
        scale: multiple of mu that its score was measured at; None without a score.
        score: how many times more similar it makes the model's samples; None if pilot samples showed that it does nothing.
        clean_dispersion: dispersion of as many samples without a trigger; None without a score.
        samples: triggered samples that the score was measured on.
        consensus: a new image that some of its pilot samples agree on; None if there is none, or none was looked for.
    """

    __test__ = False  # pytest collects classes by this name
    candidate: Candidate
    outcome: Outcome
    scale: float | None = None
    score: float | None = None
    clean_dispersion: float | None = None
    samples: int = 0
    consensus: Consensus | None = None

    @property
    def accepted(self) -> bool:
        return self.outcome is Outcome.ACCEPTED

    @property
    def trigger(self) -> Trigger:
        """The candidate at the scale that its score was measured at."""
        return self.candidate.trigger(1.0 if self.scale is None else self.scale)


@dataclass(frozen=True)
class SearchResult:
    """Every candidate of a search, in the order of their tests."""

    tried: tuple[TestResult, ...]

    @property
    def best(self) -> TestResult:
        """The result with the largest score; see `best_of`."""
        return best_of(self.tried)


def best_of(tried: Sequence[TestResult]) -> TestResult:
    """The first result that has the largest score; the first of all if none has a score."""
    return max(tried, key=lambda result: -math.inf if result.score is None else result.score)
