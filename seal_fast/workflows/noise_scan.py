"""The detector of noise triggers: recover a trigger of an unconditional model, and decide by a calibration."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from seal_fast.checkpoints import load_denoiser
from seal_fast.diffusion import Denoiser
from seal_fast.noise_triggers import Calibration, Reversion, model_evidence, noise_scope
from seal_fast.results.progress import OnProgress, Progress
from seal_fast.results.scan import DetectorName
from seal_fast.workflows.detector import Findings, Loaded
from seal_fast.workflows.revert import revert
from seal_fast.workflows.trigger_files import TRIGGER_FILE, save_images, save_trigger


@dataclass(frozen=True)
class NoiseScan:
    """Scans an unconditional model for noise triggers.

    Attributes:
        calibration: the calibration that decides; the reversion takes its settings from it.
        weights: "ema" or "raw", where a checkpoint holds both.
        seed: seed of the reversion and of the images.
        preset: name of the shipped calibration; None for one that was given.
    """

    calibration: Calibration
    weights: str = "ema"
    seed: int = 0
    preset: str | None = None

    @property
    def name(self) -> DetectorName:
        return "noise"

    @property
    def config(self) -> dict[str, Any]:
        models = self.calibration.models
        backdoored = sum(model.backdoored for model in models)
        digest = hashlib.sha256(json.dumps(asdict(self.calibration), sort_keys=True).encode()).hexdigest()
        return {
            "preset": self.preset,
            "settings": asdict(self.calibration.settings),
            "calibration": {"benign": len(models) - backdoored, "backdoored": backdoored, "sha256": digest},
            "weights": self.weights,
        }

    def accepts(self, path: Path) -> bool:
        """Every checkpoint: the loader says what is wrong with one that it refuses."""
        return True

    def load(self, path: Path, device: str) -> Loaded[Denoiser]:
        loaded = load_denoiser(path, weights=self.weights, device=device)
        denoiser = loaded.denoiser
        digest = config_digest(denoiser)
        return Loaded(denoiser, loaded.sha256, loaded.format, denoiser.family, digest, loaded.notes)

    def search(self, loaded: Loaded[Denoiser], at: Progress, on_progress: OnProgress) -> Reversion:
        return revert(loaded.model, self.calibration.settings, seed=self.seed, at=at, on_progress=on_progress)

    def findings(self, loaded: Loaded[Denoiser], search: Reversion) -> Findings:
        evidence, denoiser = model_evidence(search), loaded.model
        return Findings(
            self.calibration.decide(evidence, denoiser.family, denoiser.shape),
            noise_scope(self.calibration.settings, denoiser.shape),
            evidence,
            search.candidates,
        )

    def save_triggers(self, loaded: Loaded[Denoiser], search: Reversion, folder: Path) -> str | None:
        if not search.finite:
            return None
        save_trigger(search, loaded.model, loaded.sha256, folder)
        return TRIGGER_FILE

    def save_images(self, loaded: Loaded[Denoiser], search: Reversion, folder: Path) -> None:
        if search.finite:
            save_images(search, loaded.model, self.seed, folder)


def config_digest(denoiser: Denoiser) -> str:
    """SHA-256 of what a checkpoint says besides its weights: structure of the network, noise process and value range."""
    process = denoiser.process
    structure = {key: value for key, value in dict(getattr(denoiser.network, "config", {})).items() if not key.startswith("_")}
    described = [structure, str(denoiser.family), process.signal.tolist(), process.noise.tolist(), denoiser.value_range]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
