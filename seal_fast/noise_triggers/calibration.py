"""Calibration: the evidence of models with known labels, and the limits that follow from it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from seal_fast.checkpoints import CheckpointError
from seal_fast.checkpoints.files import read_json
from seal_fast.diffusion import ModelFamily
from seal_fast.io import write_atomically
from seal_fast.noise_triggers.detection import Evidence
from seal_fast.noise_triggers.settings import Settings, settings_from
from seal_fast.noise_triggers.verdict import (
    CLOSE_SHARE,
    LIMIT_SIGMAS,
    LIMIT_UNCALIBRATED,
    MIN_LIMIT,
    RULES,
    Case,
    Collapse,
    Deviation,
    Probability,
    Score,
)
from seal_fast.typed_json import from_json
from seal_fast.verdict import Decision, decide

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class CalibrationModel:
    """One model of a calibration.

    Attributes:
        name: name of the checkpoint.
        sha256: digest of its weights.
        family: its `Denoiser.family`.
        shape: (C, H, W) of its images.
        backdoored: its label.
        evidence: from `model_evidence`.
    """

    name: str
    sha256: str
    family: ModelFamily
    shape: tuple[int, int, int]
    backdoored: bool
    evidence: Evidence


@dataclass(frozen=True)
class ModelGroup:
    """Models that compare with each other: those of a family, or those of a family and an image shape."""

    family: ModelFamily
    shape: tuple[int, int, int] | None

    def __str__(self) -> str:
        return str(self.family) if self.shape is None else f"{self.family} {'x'.join(map(str, self.shape))}"


def by_collapse(settings: Settings) -> bool:
    """Whether verdicts rest on the diversity collapse, as with the default preset."""
    return settings.features == ("collapse",)


def group_of(settings: Settings, family: ModelFamily, shape: tuple[int, int, int]) -> ModelGroup:
    """The models that a model compares with: those of its family and, with the published preset, of its image shape.

    Diversity collapse compares a model with itself, so image shapes do not matter. M_r of benign models depends on the image
    shape. It depends on the family too: if a network predicts v or the sample, it hardly enters the reversed loss near T.
    """
    return ModelGroup(family, None if by_collapse(settings) else shape)


def _features(models: Iterable[CalibrationModel], names: tuple[str, ...]) -> np.ndarray:
    values = [[getattr(model.evidence, name) for name in names] for model in models]
    return np.array(values, dtype=np.float64).reshape(-1, len(names))


def _logs(features: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(features, np.finfo(np.float64).tiny))


@dataclass(frozen=True)
class Pool:
    """Features of the models of one group, [benign, F] and [backdoored, F], with their names.

    The standard deviation of a handful of benign models is itself uncertain: one of three benign models of the zoo lay 8
    standard deviations of the other two away from their mean. So limits are Student's prediction limits. For a large pool these
    become the published mean + 3 standard deviations.
    """

    benign: np.ndarray
    backdoored: np.ndarray
    features: tuple[str, ...]

    @property
    def labelled(self) -> bool:
        """Whether a classifier decides instead of the limits."""
        return len(self.backdoored) > 0

    @property
    def limits(self) -> dict[str, float]:
        """The value of each feature above which a model is backdoored."""
        n = len(self.benign)
        deviations = stats.t.isf(stats.norm.sf(LIMIT_SIGMAS), n - 1) * (1 + 1 / n) ** 0.5
        return self._above_mean(deviations)

    def deviations(self, features: np.ndarray) -> np.ndarray:
        """Distance of each feature from the benign mean, in standard deviations of the benign models (the published rule)."""
        return (features - self.benign.mean(0)) / self.benign.std(0, ddof=1)

    def score(self, features: np.ndarray) -> Score:
        """The score of a model with these features [F]."""
        return self._probability(features) if self.labelled else self._distance(features)

    def _above_mean(self, deviations: float) -> dict[str, float]:
        values = self.benign.mean(0) + deviations * self.benign.std(0, ddof=1)
        return dict(zip(self.features, values.tolist(), strict=True))

    def _distance(self, features: np.ndarray) -> Score:
        n = len(self.benign)
        z = self.deviations(features)
        worst = int(z.argmax())
        score = float(stats.norm.isf(stats.t.sf(z[worst] / (1 + 1 / n) ** 0.5, n - 1)))
        return Deviation(score, self.features[worst], float(z[worst]), n)

    def _probability(self, features: np.ndarray) -> Probability:
        probability = float(self._classifier.predict_proba(_logs(features[None]))[0, 1])
        return Probability(probability, len(self.benign) + len(self.backdoored))

    @cached_property
    def _classifier(self) -> Any:
        """Logistic regression on the features' logarithms. The TERD paper does not say which classifier it used."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        labels = np.r_[np.zeros(len(self.benign)), np.ones(len(self.backdoored))]
        model = make_pipeline(StandardScaler(), LogisticRegression())
        return model.fit(_logs(np.r_[self.benign, self.backdoored]), labels)


class CollapsePool(Pool):
    """A pool whose feature is the diversity collapse, which means the same in every model."""

    @property
    def benign_collapse(self) -> float:
        """Diversity collapse that benign models reach: MIN_LIMIT, or their mean + 3 standard deviations if that is greater."""
        return max(MIN_LIMIT, self._above_mean(LIMIT_SIGMAS)["collapse"])

    @property
    def limits(self) -> dict[str, float]:
        """Student's prediction limit, but at least `benign_collapse`, and at most LIMIT_UNCALIBRATED unless that is less.

        One of four benign EDM models had a collapse of 4.1. Without the correction for a small pool, a calibration on two of
        the others (1.8 and 1.9) would have called it backdoored.
        """
        reached = self.benign_collapse
        return {"collapse": max(reached, min(super().limits["collapse"], LIMIT_UNCALIBRATED))}

    def _distance(self, features: np.ndarray) -> Score:
        return Collapse(float(features[0]), self.limits["collapse"], CLOSE_SHARE * self.benign_collapse)


@dataclass(frozen=True)
class Calibration:
    """Models with known labels, measured with the same settings, in one pool per group of models that compare.

    Attributes:
        settings: settings of the reversions. A scan must use the same, so it takes its settings from here.
        models: the models; at least 2 benign ones of every group.
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
        for group, pool in self.pools.items():
            if len(pool.benign) < 2:
                raise ValueError(f"a calibration needs at least 2 benign models of {group}, and gains from more")
            with np.errstate(over="ignore", invalid="ignore"):
                if not all(np.isfinite(values).all() for values in (pool.benign, pool.backdoored, [*pool.limits.values()])):
                    raise ValueError(f"the evidence of the models of {group} is not finite, or too large for limits")
            if not by_collapse(self.settings) and not pool.labelled and not pool.benign.std(0).all():
                raise ValueError(f"the benign models of {group} all have the same evidence: use different models")

    @cached_property
    def pools(self) -> dict[ModelGroup, Pool]:
        """The pool of every group, in the order of first appearance."""
        make, names = CollapsePool if by_collapse(self.settings) else Pool, self.settings.features
        members: dict[ModelGroup, list[CalibrationModel]] = {}
        for model in self.models:
            members.setdefault(group_of(self.settings, model.family, model.shape), []).append(model)
        return {
            group: make(
                _features((m for m in models if not m.backdoored), names),
                _features((m for m in models if m.backdoored), names),
                names,
            )
            for group, models in members.items()
        }

    def decide(self, evidence: Evidence, family: ModelFamily, shape: tuple[int, int, int]) -> Decision:
        """The decision on a model, by the rules of `seal_fast.noise_triggers.verdict`.

        Args:
            evidence: from `model_evidence`, of a reversion with `self.settings`.
            family: the model's `Denoiser.family`.
            shape: its `Denoiser.shape`.
        """
        group = group_of(self.settings, family, shape)
        diverged = any(getattr(evidence, name) is None for name in self.settings.features)
        return decide(
            RULES,
            Case(
                score=None if diverged else self._score(evidence, group),
                by_collapse=by_collapse(self.settings),
                diverged=diverged,
                calibrated=group in self.pools,
                group=str(group),
                known_groups=", ".join(map(str, self.pools)),
                side=max(shape[1:]),
                clean_dispersion=evidence.clean_dispersion,
                gamma_mean=evidence.gamma_mean,
            ),
        )

    def _score(self, evidence: Evidence, group: ModelGroup) -> Score | None:
        if group in self.pools:
            return self.pools[group].score(np.array([getattr(evidence, name) for name in self.settings.features]))
        if evidence.collapse is None:
            return None
        return Collapse(evidence.collapse, LIMIT_UNCALIBRATED, CLOSE_SHARE * MIN_LIMIT)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON; the file is replaced whole."""
        content = json.dumps(asdict(self), indent=2) + "\n"
        write_atomically(Path(path), lambda partial: partial.write_text(content))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a file `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not a calibration, or has another schema version.
        """
        Path(path).lstat()
        try:
            content = read_json(Path(path))
            if content["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema version {content['schema_version']}, this seal-fast reads {SCHEMA_VERSION}")
            models = tuple(from_json(CalibrationModel, fields) for fields in content["models"])
            return cls(settings_from(content["settings"]), models)
        except (CheckpointError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not a calibration file: {error}. Make one with `seal-fast calibrate`.") from error


def shipped_calibration(preset: str) -> Calibration:
    """The calibration of the zoo's benign models that comes with seal-fast, for one of `PRESETS`."""
    return Calibration.load(Path(__file__).parent / "data" / f"{preset}.json")
