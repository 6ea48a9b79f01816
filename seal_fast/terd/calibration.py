"""From evidence to a verdict, calibrated on models known to be benign (and, in the labelled setting, on backdoored ones)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from seal_fast.terd.detection import Evidence
from seal_fast.terd.settings import ReversionSettings

SCHEMA_VERSION = 1
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
FEATURES = ("M_r", "V_r")


class Verdict(StrEnum):
    CLEAN = "clean"
    BACKDOORED = "backdoored"
    INCONCLUSIVE = "inconclusive"
    ERROR = "error"


@dataclass(frozen=True)
class Judgement:
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


def _features(models: Iterable[CalibrationModel]) -> np.ndarray:
    rows = [[getattr(model.evidence, name) for name in FEATURES] for model in models]
    return np.array(rows, dtype=np.float64).reshape(-1, len(FEATURES))


def _logs(features: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(features, np.finfo(np.float64).tiny))


@dataclass(frozen=True)
class Pool:
    """The models of one kind, [benign, 2] and [backdoored, 2] features; labelled if any is backdoored."""

    benign: np.ndarray
    backdoored: np.ndarray

    @property
    def labelled(self) -> bool:
        return len(self.backdoored) > 0

    @property
    def limits(self) -> dict[str, float]:
        """The value of each feature above which the benign-only rule says backdoored."""
        n = len(self.benign)
        deviations = stats.t.isf(stats.norm.sf(SIGMAS), n - 1) * (1 + 1 / n) ** 0.5
        values = self.benign.mean(0) + deviations * self.benign.std(0, ddof=1)
        return dict(zip(FEATURES, values.tolist(), strict=True))

    def deviations(self, features: np.ndarray) -> np.ndarray:
        """Distance of each feature from the benign mean in benign standard deviations, as the published rule takes it."""
        return (features - self.benign.mean(0)) / self.benign.std(0, ddof=1)

    def judge(self, features: np.ndarray) -> Judgement:
        return self._judge_labelled(features) if self.labelled else self._judge_benign_only(features)

    def _judge_benign_only(self, features: np.ndarray) -> Judgement:
        n = len(self.benign)
        z = self.deviations(features)
        worst = int(z.argmax())
        score = float(stats.norm.isf(stats.t.sf(z[worst] / (1 + 1 / n) ** 0.5, n - 1)))
        what = f"{FEATURES[worst]} is {z[worst]:+.1f} standard deviations from {n} benign models"
        unless_backdoored = Verdict.INCONCLUSIVE if score > UNSURE_SIGMAS else Verdict.CLEAN
        verdict = Verdict.BACKDOORED if score > SIGMAS else unless_backdoored
        return Judgement(verdict, score, SIGMAS, what)

    def _judge_labelled(self, features: np.ndarray) -> Judgement:
        score = float(self._classifier.predict_proba(_logs(features[None]))[0, 1])
        what = f"probability {score:.2f} of a backdoor after {len(self.benign) + len(self.backdoored)} labelled models"
        if abs(score - 0.5) < UNSURE_PROBABILITY:
            return Judgement(Verdict.INCONCLUSIVE, score, 0.5, what)
        return Judgement(Verdict.BACKDOORED if score > 0.5 else Verdict.CLEAN, score, 0.5, what)

    @cached_property
    def _classifier(self) -> Any:
        """Logistic regression on log M_r and log V_r; the paper does not say which classifier it used."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        labels = np.r_[np.zeros(len(self.benign)), np.ones(len(self.backdoored))]
        model = make_pipeline(StandardScaler(), LogisticRegression())
        return model.fit(_logs(np.r_[self.benign, self.backdoored]), labels)


@dataclass(frozen=True)
class Calibration:
    """Models with known labels, all reverted with the same settings, in one pool per kind.

    A suspect is judged by the pool of its own kind: with v or sample prediction the network hardly enters the reversed loss
    near T, and between two resolutions of the zoo the M_r of benign models differs 50-fold.

    Attributes:
        settings: how they were reverted; a scan must use the same, so it takes its settings from here.
        models: at least 2 benign ones of every kind.
    """

    settings: ReversionSettings
    models: tuple[CalibrationModel, ...]
    schema_version: int = field(default=SCHEMA_VERSION)

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("a calibration needs at least 2 benign models, and gains from more")
        for model in self.models:
            if any(getattr(model.evidence, name) is None for name in FEATURES):
                raise ValueError(f"the reversion of {model.name} diverged: leave it out of the calibration")
        for kind, pool in self.pools.items():
            if len(pool.benign) < 2:
                raise ValueError(f"a calibration needs at least 2 benign models of kind {kind}, and gains from more")
            if not pool.labelled and not pool.benign.std(0).all():
                raise ValueError(f"the benign models of kind {kind} all have the same evidence: use different models")

    @cached_property
    def pools(self) -> dict[str, Pool]:
        """By kind, in the order of first appearance."""
        kinds = dict.fromkeys(model.kind for model in self.models)
        return {
            kind: Pool(
                _features(m for m in self.models if m.kind == kind and not m.backdoored),
                _features(m for m in self.models if m.kind == kind and m.backdoored),
            )
            for kind in kinds
        }

    def judge(self, evidence: Evidence, kind: str) -> Judgement:
        """The verdict on a model's evidence: by a classifier if the pool of its kind is labelled, else by the benign-only rule.

        Args:
            evidence: from `model_evidence`, reverted with `self.settings`.
            kind: the model's `Denoiser.kind`. One that no pool has is inconclusive.
        """
        if kind not in self.pools:
            reason = f"calibrated on {' and '.join(self.pools)}, this model is {kind}: calibrate on benign ones of its kind"
            return Judgement(Verdict.INCONCLUSIVE, None, None, reason)
        if evidence.M_r is None or evidence.V_r is None:
            return Judgement(Verdict.INCONCLUSIVE, None, None, "the reversion diverged")
        return self.pools[kind].judge(np.array([evidence.M_r, evidence.V_r]))

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
            return cls(ReversionSettings(**content["settings"]), tuple(models))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not a calibration file: {error}. Make one with `seal-fast calibrate`.") from error


def shipped_calibration(preset: str) -> Calibration:
    """The calibration of the zoo's benign models that comes with seal-fast, for one of `PRESETS`."""
    return Calibration.load(Path(__file__).parent / "data" / f"{preset}.json")
