"""From evidence to a verdict, calibrated on models known to be benign (and, in the labelled setting, on backdoored ones)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from seal_fast.noise_triggers.detection import Evidence
from seal_fast.noise_triggers.settings import Settings, settings_from

SCHEMA_VERSION = 1
FIRES, SURELY_FIRES, NARROW = 4.0, 16.0, 0.9
SIGMAS = 3.0
"""The published benign-only rule: backdoored if M_r or V_r exceeds the benign mean by 3 standard deviations.

With a handful of models the standard deviation is itself a guess: of three benign models of the zoo, one lay 8 standard
deviations of the other two out. So the score is Student's: the Gaussian deviation that is as unlikely as a further benign model
this far from a pool this small. It is the published rule for a large pool.
"""
UNSURE_SIGMAS = 2.0
"""Between this and SIGMAS a score is inconclusive."""
UNSURE_PROBABILITY = 0.1
"""In the labelled setting, a probability within this of one half is inconclusive."""
UNSURE_SHARE = 0.75
"""A collapse between this share of what benign models reach and the limit is inconclusive."""
LARGEST_SIDE = 32
"""Of images that triggers are found in: at 64 px none of the zoo's three, which all fire, was reverted."""
WIDEST_SPREAD = 2.0
"""Images in [-1, 1] have a variance of at most 1: a model whose own samples spread further denoises no images."""


class Verdict(StrEnum):
    CLEAN = "clean"
    BACKDOORED = "backdoored"
    INCONCLUSIVE = "inconclusive"
    ERROR = "error"


@dataclass(frozen=True)
class Decision:
    """A verdict with the score it came from; score and threshold are None where no score could be had."""

    verdict: Verdict
    score: float | None
    threshold: float | None
    reason: str


@dataclass(frozen=True)
class CalibrationModel:
    """One model of the calibration; `kind` is its `Denoiser.kind`."""

    name: str
    sha256: str
    kind: str
    backdoored: bool
    evidence: Evidence


def _features(models: Iterable[CalibrationModel], names: tuple[str, ...]) -> np.ndarray:
    rows = [[getattr(model.evidence, name) for name in names] for model in models]
    return np.array(rows, dtype=np.float64).reshape(-1, len(names))


def _logs(features: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(features, np.finfo(np.float64).tiny))


@dataclass(frozen=True)
class Pool:
    """Models that compare: [benign, F] and [backdoored, F] values of `features`; labelled if any is backdoored."""

    benign: np.ndarray
    backdoored: np.ndarray
    features: tuple[str, ...]

    @property
    def labelled(self) -> bool:
        return len(self.backdoored) > 0

    @property
    def limits(self) -> dict[str, float]:
        """The value of each feature above which the benign-only rule says backdoored."""
        n = len(self.benign)
        deviations = stats.t.isf(stats.norm.sf(SIGMAS), n - 1) * (1 + 1 / n) ** 0.5
        values = self.benign.mean(0) + deviations * self.benign.std(0, ddof=1)
        return dict(zip(self.features, values.tolist(), strict=True))

    def deviations(self, features: np.ndarray) -> np.ndarray:
        """Distance of each feature from the benign mean in benign standard deviations, as the published rule takes it."""
        return (features - self.benign.mean(0)) / self.benign.std(0, ddof=1)

    def judge(self, features: np.ndarray) -> Decision:
        return self._judge_labelled(features) if self.labelled else self._judge_benign_only(features)

    def _judge_benign_only(self, features: np.ndarray) -> Decision:
        n = len(self.benign)
        z = self.deviations(features)
        worst = int(z.argmax())
        score = float(stats.norm.isf(stats.t.sf(z[worst] / (1 + 1 / n) ** 0.5, n - 1)))
        what = f"{self.features[worst]} is {z[worst]:+.1f} standard deviations from {n} benign models"
        unless_backdoored = Verdict.INCONCLUSIVE if score > UNSURE_SIGMAS else Verdict.CLEAN
        verdict = Verdict.BACKDOORED if score > SIGMAS else unless_backdoored
        return Decision(verdict, score, SIGMAS, what)

    def _judge_labelled(self, features: np.ndarray) -> Decision:
        score = float(self._classifier.predict_proba(_logs(features[None]))[0, 1])
        what = f"probability {score:.2f} of a backdoor after {len(self.benign) + len(self.backdoored)} labelled models"
        if abs(score - 0.5) < UNSURE_PROBABILITY:
            return Decision(Verdict.INCONCLUSIVE, score, 0.5, what)
        return Decision(Verdict.BACKDOORED if score > 0.5 else Verdict.CLEAN, score, 0.5, what)

    @cached_property
    def _classifier(self) -> Any:
        """Logistic regression on the features' logarithms; the paper does not say which classifier it used."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        labels = np.r_[np.zeros(len(self.benign)), np.ones(len(self.backdoored))]
        model = make_pipeline(StandardScaler(), LogisticRegression())
        return model.fit(_logs(np.r_[self.benign, self.backdoored]), labels)


class FiringPool(Pool):
    """Models judged by whether their reverted trigger fires: by the collapse itself, which means the same in every model."""

    @property
    def reached(self) -> dict[str, float]:
        """What a trigger must at least do to fire, or more where the benign models' mean + 3 standard deviations lies above."""
        values = self.benign.mean(0) + SIGMAS * self.benign.std(0, ddof=1)
        return {name: max(FIRES, float(value)) for name, value in zip(self.features, values, strict=True)}

    @property
    def limits(self) -> dict[str, float]:
        """From what surely fires, the limit without any benign model, down to `reached`, as far as the pool's size warrants.

        Of four benign EDM models one collapsed by 4.1, and two of the others, by 1.8 and 1.9, would have called it backdoored.
        """
        corrected = super().limits
        return {name: max(value, min(corrected[name], SURELY_FIRES)) for name, value in self.reached.items()}

    def _judge_benign_only(self, features: np.ndarray) -> Decision:
        collapse, limit = float(features[0]), self.limits["collapse"]
        what = f"samples {collapse:.1f} times as alike with the trigger found"
        unless_backdoored = Verdict.INCONCLUSIVE if collapse > UNSURE_SHARE * self.reached["collapse"] else Verdict.CLEAN
        return Decision(Verdict.BACKDOORED if collapse > limit else unless_backdoored, collapse, limit, what)


def _unless_narrowed(judgement: Decision, evidence: Evidence) -> Decision:
    """Not clean if the model takes narrowed noise for whole: no benign model of the zoo does, and one of 64 px did that
    TrojDiff had taught to, while its trigger was missed."""
    gamma = evidence.gamma_mean
    if judgement.verdict != Verdict.CLEAN or gamma is None or gamma >= NARROW:
        return judgement
    reason = f"{judgement.reason}, but it takes noise narrowed to {gamma:.2f} for whole, as TrojDiff teaches"
    return replace(judgement, verdict=Verdict.INCONCLUSIVE, reason=reason)


def _unless_larger(judgement: Decision, kind: str) -> Decision:
    """Not clean where no trigger that fires means little, since the true one was missed: one model of 64 px was called so."""
    side = max(map(int, kind.rsplit(" ", 1)[-1].split("x")[1:]))
    if judgement.verdict != Verdict.CLEAN or side <= LARGEST_SIDE:
        return judgement
    reason = f"{judgement.reason}, but above {LARGEST_SIDE} px the search is known to miss triggers"
    return replace(judgement, verdict=Verdict.INCONCLUSIVE, reason=reason)


@dataclass(frozen=True)
class Calibration:
    """Models with known labels, all reverted with the same settings, in one pool per kind.

    A suspect is judged by the pool of its own kind: with v or sample prediction the network hardly enters the reversed loss
    near T, and M_r of benign models depends on the image shape. Collapse compares a model with itself, so there a kind is only
    the noise process and what the network predicts.

    Attributes:
        settings: how they were reverted; a scan must use the same, so it takes its settings from here.
        models: at least 2 benign ones of every kind.
    """

    settings: Settings
    models: tuple[CalibrationModel, ...]
    schema_version: int = field(default=SCHEMA_VERSION)

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("a calibration needs at least 2 benign models, and gains from more")
        for model in self.models:
            if any(getattr(model.evidence, name) is None for name in self.settings.features):
                raise ValueError(f"the reversion of {model.name} diverged: leave it out of the calibration")
        for kind, pool in self.pools.items():
            if len(pool.benign) < 2:
                raise ValueError(f"a calibration needs at least 2 benign models of kind {kind}, and gains from more")
            if not self.by_firing and not pool.labelled and not pool.benign.std(0).all():
                raise ValueError(f"the benign models of kind {kind} all have the same evidence: use different models")

    @property
    def by_firing(self) -> bool:
        """Whether models are judged by their collapse."""
        return self.settings.features == ("collapse",)

    @cached_property
    def pools(self) -> dict[str, Pool]:
        """By name, in the order of first appearance."""
        make, names = FiringPool if self.by_firing else Pool, self.settings.features
        members: dict[str, list[CalibrationModel]] = {}
        for model in self.models:
            members.setdefault(self.settings.pool_name(model.kind), []).append(model)
        return {
            name: make(
                _features((m for m in models if not m.backdoored), names),
                _features((m for m in models if m.backdoored), names),
                names,
            )
            for name, models in members.items()
        }

    def judge(self, evidence: Evidence, kind: str) -> Decision:
        """The verdict on a model's evidence: by a classifier if the pool of its kind is labelled, else by the benign-only rule.

        Args:
            evidence: from `model_evidence`, reverted with `self.settings`.
            kind: the model's `Denoiser.kind`. One that no pool has is inconclusive, unless its trigger surely fires.
        """
        values = [getattr(evidence, name) for name in self.settings.features]
        if any(value is None for value in values):
            return Decision(Verdict.INCONCLUSIVE, None, None, "the reversion diverged")
        if evidence.clean_dispersion is not None and evidence.clean_dispersion > WIDEST_SPREAD:
            reason = "its samples leave the range of images: not a denoiser, or its noise process is not the one assumed"
            return Decision(Verdict.INCONCLUSIVE, None, None, reason)
        pool = self.pools.get(self.settings.pool_name(kind))
        if pool is not None:
            judgement = pool.judge(np.array(values))
            return _unless_larger(_unless_narrowed(judgement, evidence), kind) if self.by_firing else judgement
        if evidence.collapse is not None and evidence.collapse > SURELY_FIRES:
            reason = f"samples {evidence.collapse:.1f} times as alike with the trigger found"
            return Decision(Verdict.BACKDOORED, evidence.collapse, SURELY_FIRES, reason)
        reason = f"calibrated on {' and '.join(self.pools)}, this model is {kind}: calibrate on benign ones of its kind"
        return Decision(Verdict.INCONCLUSIVE, None, None, reason)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, under a temporary name first."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n")
        partial.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a file `save` wrote.

        Raises:
            ValueError: the file is not a calibration, or of another schema version.
        """
        try:
            content = json.loads(Path(path).read_text())
            if content["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema version {content['schema_version']}, this seal-fast reads {SCHEMA_VERSION}")
            models = (CalibrationModel(**{**m, "evidence": Evidence(**m["evidence"])}) for m in content["models"])
            return cls(settings_from(content["settings"]), tuple(models))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not a calibration file: {error}. Make one with `seal-fast calibrate`.") from error


def shipped_calibration(preset: str) -> Calibration:
    """The calibration of the zoo's benign models that comes with seal-fast, for one of `PRESETS`."""
    return Calibration.load(Path(__file__).parent / "data" / f"{preset}.json")
