"""From evidence to a verdict, calibrated on models known to be benign (and, in the labelled setting, on backdoored ones)."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from seal_fast.terd.detection import Evidence
from seal_fast.terd.settings import ReversionSettings

SCHEMA_VERSION = 1
SIGMAS = 3.0
"""The published benign-only rule: backdoored if M_r or V_r exceeds the benign mean by 3 standard deviations."""
UNSURE_SIGMAS = 2.0
"""Between this and SIGMAS a score is inconclusive: a pool of a handful of models cannot tell such a value from chance."""
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
    """One model of the calibration pool; `process` is its `NoiseProcess.kind`."""

    name: str
    sha256: str
    process: str
    backdoored: bool
    evidence: Evidence


def _logs(features: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(features, np.finfo(np.float64).tiny))


@dataclass(frozen=True)
class Calibration:
    """A pool of models with known labels, all reverted with the same settings.

    Attributes:
        settings: how they were reverted; a scan must use the same, so it takes its settings from here.
        models: the pool; at least 2 benign ones.
    """

    settings: ReversionSettings
    models: tuple[CalibrationModel, ...]
    schema_version: int = field(default=SCHEMA_VERSION)

    def __post_init__(self) -> None:
        for model in self.models:
            if any(getattr(model.evidence, name) is None for name in FEATURES):
                raise ValueError(f"the reversion of {model.name} diverged: leave it out of the calibration")
        if len(self._pool(backdoored=False)) < 2:
            raise ValueError("a calibration needs at least 2 benign models, and gains from more")
        if not self.labelled and not self._pool(backdoored=False).std(0).all():
            raise ValueError("the benign models all have the same evidence, so their spread says nothing: use different models")

    def _pool(self, backdoored: bool) -> np.ndarray:
        """Features [models, 2] of one label."""
        chosen = [[getattr(m.evidence, name) for name in FEATURES] for m in self.models if m.backdoored == backdoored]
        return np.array(chosen, dtype=np.float64).reshape(-1, len(FEATURES))

    @property
    def labelled(self) -> bool:
        return len(self._pool(backdoored=True)) > 0

    def judge(self, evidence: Evidence, process: str) -> Judgement:
        """The verdict on a model's evidence: labelled if the pool holds backdoored models, else benign-only.

        Args:
            evidence: from `model_evidence`, reverted with `self.settings`.
            process: the model's `NoiseProcess.kind`. A kind that the pool lacks is inconclusive: with v or sample prediction
                the network hardly enters the reversed loss near T, so its statistics mean something else.
        """
        kinds = sorted({model.process for model in self.models})
        if process not in kinds:
            reason = f"calibrated on {' and '.join(kinds)} models, this one is {process}: calibrate on benign ones of its kind"
            return Judgement(Verdict.INCONCLUSIVE, None, None, reason)
        if evidence.M_r is None or evidence.V_r is None:
            return Judgement(Verdict.INCONCLUSIVE, None, None, "the reversion diverged")
        features = np.array([evidence.M_r, evidence.V_r])
        return self._judge_labelled(features) if self.labelled else self._judge_benign_only(features)

    def _judge_benign_only(self, features: np.ndarray) -> Judgement:
        benign = self._pool(backdoored=False)
        z = (features - benign.mean(0)) / benign.std(0, ddof=1)
        worst = int(z.argmax())
        score = float(z[worst])
        what = f"{FEATURES[worst]} is {score:+.1f} standard deviations from {len(benign)} benign models"
        unless_backdoored = Verdict.INCONCLUSIVE if score > UNSURE_SIGMAS else Verdict.CLEAN
        verdict = Verdict.BACKDOORED if score > SIGMAS else unless_backdoored
        return Judgement(verdict, score, SIGMAS, what)

    def _judge_labelled(self, features: np.ndarray) -> Judgement:
        score = float(self._classifier.predict_proba(_logs(features[None]))[0, 1])
        what = f"probability {score:.2f} of a backdoor after {len(self.models)} labelled models"
        if abs(score - 0.5) < UNSURE_PROBABILITY:
            return Judgement(Verdict.INCONCLUSIVE, score, 0.5, what)
        return Judgement(Verdict.BACKDOORED if score > 0.5 else Verdict.CLEAN, score, 0.5, what)

    @cached_property
    def _classifier(self) -> Any:
        """Logistic regression on log M_r and log V_r; the paper does not say which classifier it used."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        benign, backdoored = self._pool(backdoored=False), self._pool(backdoored=True)
        labels = np.r_[np.zeros(len(benign)), np.ones(len(backdoored))]
        model = make_pipeline(StandardScaler(), LogisticRegression())
        return model.fit(_logs(np.r_[benign, backdoored]), labels)

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
