"""A request to unlearn noise triggers; `seal_fast.workflows.unlearn` carries it out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor

from seal_fast.checkpoints import CheckpointError, LoadedCheckpoint, load_denoiser
from seal_fast.checkpoints.save import save_network
from seal_fast.checkpoints.text_to_image import identify as identify_text_to_image
from seal_fast.checkpoints.trigger import Trigger
from seal_fast.diffusion import Denoiser
from seal_fast.noise_triggers.evaluation import TriggerSamples, clean_drift, sample_trigger
from seal_fast.noise_triggers.unlearning import NoiseUnlearnSettings, UnlearnedDenoiser, unlearn_denoiser
from seal_fast.report.figures import BEFORE_AFTER, draw_samples
from seal_fast.results.unlearning import NoiseTriggerEffect, NoiseUnlearnReport, UnlearnRun
from seal_fast.training import OnStep
from seal_fast.workflows.capacity import default_device
from seal_fast.workflows.found import digest_notes

IMAGES = 8
"""Columns of a before-and-after figure."""


@dataclass(frozen=True)
class _Loaded:
    """The poisoned model and the triggers by name."""

    checkpoint: LoadedCheckpoint
    names: tuple[str, ...]
    triggers: tuple[Trigger, ...]


@dataclass(frozen=True)
class _After:
    samples: list[TriggerSamples]
    clean_drift: float


@dataclass(frozen=True)
class NoiseUnlearning:
    """Unlearn noise triggers of an unconditional model.

    Attributes:
        model: path of the poisoned checkpoint, anything `load_denoiser` takes; or a `Denoiser`.
        triggers: triggers, or paths of trigger.safetensors files of a scan. Without any, random shifts of the noise are
            unlearned and nothing but clean drift is measured.
        out: new folder for the unlearned checkpoint, report.json, README.md and images; None writes nothing.
        settings: settings of the training.
        weights: "ema" or "raw", for a checkpoint that holds both.
        seed: seed of the training and of all samples.
        scanned_sha256: digest of the model in which a scan found the triggers; a model with another one gets a note.
    """

    model: str | os.PathLike[str] | Denoiser
    triggers: Sequence[Trigger | str | os.PathLike[str]] = ()
    out: str | os.PathLike[str] | None = None
    settings: NoiseUnlearnSettings = field(default_factory=NoiseUnlearnSettings)
    weights: str = "ema"
    seed: int = 0
    scanned_sha256: str | None = None

    # measured with the default settings and one trigger
    shares: ClassVar[Mapping[str, float]] = MappingProxyType(
        {
            "loading": 0.02,
            "measuring before": 0.15,
            "images": 0.14,
            "training": 0.52,
            "measuring after": 0.15,
            "writing": 0.02,
        }
    )

    def check(self) -> None:
        self._named_triggers()
        # the loader reports a broken checkpoint
        with suppress(CheckpointError):
            if not isinstance(self.model, Denoiser) and identify_text_to_image(Path(self.model)):
                raise ValueError("this is a text-to-image model: name its text trigger")

    def _named_triggers(self) -> list[tuple[str, Trigger]]:
        return [
            (f"trigger {number}", one) if isinstance(one, Trigger) else (Path(one).name, Trigger.load(one))
            for number, one in enumerate(self.triggers, 1)
        ]

    def load(self) -> _Loaded:
        if isinstance(self.model, Denoiser):
            checkpoint = LoadedCheckpoint(self.model, "denoiser", "", ())
        else:
            checkpoint = load_denoiser(Path(self.model), weights=self.weights, device=default_device())
        named, shape = self._named_triggers(), checkpoint.denoiser.shape
        for name, trigger in named:
            if trigger.mu.shape != shape:
                raise ValueError(f"{name}: a trigger of shape {list(trigger.mu.shape)} does not fit the model's {list(shape)}")
        return _Loaded(checkpoint, tuple(name for name, _ in named), tuple(trigger for _, trigger in named))

    def measure_before(self, loaded: _Loaded) -> list[TriggerSamples]:
        return self._samples(loaded.checkpoint.denoiser, loaded.triggers)

    def _samples(self, denoiser: Denoiser, triggers: Sequence[Trigger]) -> list[TriggerSamples]:
        return [sample_trigger(denoiser, trigger, seed=self.seed) for trigger in triggers]

    def train(self, loaded: _Loaded, before: list[TriggerSamples], on_step: OnStep) -> UnlearnedDenoiser:
        targets = [target for samples in before if (target := samples.target()) is not None]
        denoiser = loaded.checkpoint.denoiser
        return unlearn_denoiser(denoiser, loaded.triggers, self.settings, targets=targets, seed=self.seed, on_step=on_step)

    def measure_after(
        self, loaded: _Loaded, before: list[TriggerSamples], trained: UnlearnedDenoiser, on_step: OnStep
    ) -> _After:
        drift = clean_drift(loaded.checkpoint.denoiser, trained.denoiser, seed=self.seed)
        return _After(self._samples(trained.denoiser, loaded.triggers), drift)

    def report(
        self, run: UnlearnRun, loaded: _Loaded, before: list[TriggerSamples], trained: UnlearnedDenoiser, after: _After
    ) -> NoiseUnlearnReport:
        return NoiseUnlearnReport(
            **vars(run),
            sha256=loaded.checkpoint.sha256 or None,
            format=loaded.checkpoint.format,
            steps=trained.steps,
            config={
                "settings": asdict(self.settings),
                "weights": self.weights,
                "seed": self.seed,
                "device": str(loaded.checkpoint.denoiser.device),
            },
            notes=(*loaded.checkpoint.notes, *digest_notes(self.scanned_sha256, loaded.checkpoint.sha256)),
            effects=tuple(
                NoiseTriggerEffect(name, sampler, old.collapse(sampler), new.collapse(sampler))
                for name, old, new in zip(loaded.names, before, after.samples, strict=True)
                for sampler in old.triggered
            ),
            clean_drift=after.clean_drift,
        )

    def write(
        self, folder: Path, loaded: _Loaded, before: list[TriggerSamples], trained: UnlearnedDenoiser, after: _After
    ) -> None:
        assert not isinstance(self.model, Denoiser)
        save_network(trained.denoiser.network, Path(self.model), folder)
        for number, (old, new) in enumerate(zip(before, after.samples, strict=True), 1):
            draw_samples(_titled("before", old) | _titled("after", new), folder / BEFORE_AFTER.format(number))

    def unlearned(self, trained: UnlearnedDenoiser) -> Denoiser:
        return trained.denoiser


def _titled(when: str, samples: TriggerSamples) -> dict[str, Tensor]:
    """The rows of a figure by title."""
    rows = {f"{when}: no trigger": samples.clean}
    rows |= {f"{when}: with the trigger, {sampler} sampling": images for sampler, images in samples.triggered.items()}
    return {title: images[:IMAGES] for title, images in rows.items()}
