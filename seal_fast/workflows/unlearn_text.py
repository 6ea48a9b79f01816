"""A request to unlearn text triggers; `seal_fast.workflows.unlearn` carries it out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from seal_fast.checkpoints.text_to_image import COMPONENTS, LoadedPipeline, load_pipeline, save_pipeline
from seal_fast.report.figures import BEFORE_AFTER, draw_attention, draw_samples
from seal_fast.results.text_unlearning import TextUnlearnReport, TrainingLosses, TriggerTokens
from seal_fast.results.unlearning import UnlearnRun
from seal_fast.text_to_image import attention_maps
from seal_fast.text_to_image.prompts import token_text
from seal_fast.text_triggers import Distilled, TextTrigger, TextUnlearnSettings, distill, prompt_pair
from seal_fast.text_triggers.effect_detectors import EffectDetector
from seal_fast.text_triggers.evaluation import Evaluation, EvaluationSettings, Examples, evaluate
from seal_fast.text_triggers.findings import Module
from seal_fast.text_triggers.locate import COLLAPSE_LIMIT, locate
from seal_fast.text_triggers.trained_part import save_patch
from seal_fast.text_triggers.trigger import Position, as_triggers
from seal_fast.text_triggers.vocabulary import with_more_holding
from seal_fast.training import OnStep
from seal_fast.workflows.capacity import default_device
from seal_fast.workflows.found import digest_notes
from seal_fast.workflows.prompts import choose_prompts
from seal_fast.workflows.text_trigger_files import shortened

ATTENTION = "attention_{}.png"
"""Name of the figure of a trigger's attention maps; triggers are numbered from 1 in the order given."""
PATCH = "pytorch_lora_weights.safetensors"
"""Name of the low-rank change alone, which stock diffusers loads. The model beside it has it merged."""


@dataclass(frozen=True)
class _Loaded:
    """The poisoned pipeline, the triggers, and the prompts with their source."""

    checkpoint: LoadedPipeline
    triggers: tuple[TextTrigger, ...]
    training_prompts: list[str]
    held_out_prompts: list[str]
    prompt_source: str


@dataclass(frozen=True)
class _Before:
    """The tokens of every trigger, and the module to train with the reason."""

    tokens: tuple[TriggerTokens, ...]
    module: Module
    module_reason: str


@dataclass(frozen=True)
class _Trained:
    """The unlearned pipeline, and the training of its module."""

    pipeline: Any
    training: Distilled


@dataclass(frozen=True)
class _After:
    evaluation: Evaluation
    examples: list[Examples]


@dataclass(frozen=True)
class TextUnlearning:
    """Unlearn text triggers of a text-to-image model by SKD-CAG (arXiv 2508.18235).

    Attributes:
        model: folder of a StableDiffusionPipeline, or of its UNet or text encoder alone; or a pipeline.
        triggers: triggers; a plain str is text to insert.
        out: new folder for the unlearned checkpoint, report.json, README.md and images; None writes nothing.
        prompts: clean prompts. Every other one is held out for the evaluation. None takes those of the model card (its
            `widget`) if it has at least `prompts.FEWEST_CAPTIONS`, else general ones that come with seal-fast.
        base: folder of the pipeline that a component belongs to.
        settings: settings of the training, except its `module`.
        module: which module to train. "auto" trains a component that came alone, else the `scanned_module`, else the module
            that `seal_fast.text_triggers.locate` finds the backdoor in.
        evaluation: size of the evaluation.
        detector: effect detector, see `seal_fast.text_triggers.effect_detectors`; None for one that does not know the target.
        seed: seed of the training and of all images.
        state: file that the training writes as it goes and resumes from, see `distill`.
        positions: where each trigger stands in the evaluation; None for `evaluation.position`.
        needed_words: for each trigger the word that a prompt must hold for it to act, or None. Prompts that hold it are trained
            more often, and the trigger is measured on them. None for triggers that act in all prompts.
        scanned_sha256: digest of the model in which a scan found the triggers; a model with another one gets a note.
        scanned_module: the module in which a scan found them, which "auto" then trains; None for triggers of another source.
    """

    model: Any
    triggers: Sequence[TextTrigger | str]
    out: str | os.PathLike[str] | None = None
    prompts: Sequence[str] | None = None
    base: str | os.PathLike[str] | None = None
    settings: TextUnlearnSettings = field(default_factory=TextUnlearnSettings)
    module: Literal["auto", "unet", "text_encoder"] = "auto"
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    detector: EffectDetector | None = None
    seed: int = 0
    state: Path | None = None
    positions: Sequence[Position] | None = None
    needed_words: Sequence[str | None] | None = None
    scanned_sha256: str | None = None
    scanned_module: Module | None = None

    # measured with the default settings
    shares: ClassVar[Mapping[str, float]] = MappingProxyType(
        {
            "loading": 0.0,
            "measuring before": 0.0,
            "images": 0.1,
            "training": 0.25,
            "measuring after": 0.6,
            "writing": 0.05,
        }
    )

    def check(self) -> None:
        triggers = as_triggers(self.triggers)
        for name, given in (("positions", self.positions), ("needed words", self.needed_words)):
            if given is not None and len(given) != len(triggers):
                raise ValueError(f"{len(given)} {name} for {len(triggers)} triggers: give one each")

    def load(self) -> _Loaded:
        path = Path(self.model) if isinstance(self.model, str | os.PathLike) else None
        base = None if self.base is None else Path(self.base)
        checkpoint = (
            load_pipeline(path, base=base, device=default_device())
            if path
            else LoadedPipeline(self.model, "", "pipeline", "", ())
        )
        return _Loaded(checkpoint, as_triggers(self.triggers), *choose_prompts(self.prompts, base or path))

    def measure_before(self, loaded: _Loaded) -> _Before:
        tokenizer, prompts = loaded.checkpoint.pipeline.tokenizer, loaded.training_prompts
        tokens = tuple(_tokens(tokenizer, trigger, prompts) for trigger in loaded.triggers)
        alone = COMPONENTS.get(loaded.checkpoint.format)
        if self.module == "auto" and alone is None and self.scanned_module is not None:
            return _Before(tokens, self.scanned_module, "the scan found the backdoor in it")
        found = locate(loaded.checkpoint.pipeline, loaded.triggers, prompts)
        reason = (
            f"with the trigger, the text encoder's hidden states of different prompts vary {found.collapse:.1f} times less "
            f"than with control words; above {COLLAPSE_LIMIT:.0f} times it holds the backdoor"
        )
        if self.module != "auto":
            return _Before(tokens, self.module, f"this module was requested; {reason}")
        if alone is not None:
            return _Before(tokens, alone, f"the checkpoint holds nothing else; {reason}")
        return _Before(tokens, found.module, reason)

    def train(self, loaded: _Loaded, before: _Before, on_step: OnStep) -> _Trained:
        pipeline = loaded.checkpoint.pipeline
        trained = distill(
            pipeline,
            loaded.triggers,
            with_more_holding(loaded.training_prompts, self.needed_words or ()),
            self._settings(before),
            seed=self.seed,
            state=self.state,
            on_step=on_step,
        )
        parts = pipeline.components | {trained.module_name: trained.module}
        return _Trained(type(pipeline)(**parts, requires_safety_checker=pipeline.config.requires_safety_checker), trained)

    def _settings(self, before: _Before) -> TextUnlearnSettings:
        return replace(self.settings, module=before.module)

    def measure_after(self, loaded: _Loaded, before: _Before, trained: _Trained, on_step: OnStep) -> _After:
        """Both models draw the held-out prompts here, since the effect detector is fitted on images of the unlearned one."""

        def on_image(_: str, image: int, images: int, loss: float) -> None:
            on_step("measuring after", image, images, loss)

        return _After(
            *evaluate(
                loaded.checkpoint.pipeline,
                trained.pipeline,
                loaded.triggers,
                loaded.held_out_prompts,
                self.evaluation,
                positions=self.positions,
                needed_words=self.needed_words,
                detector=self.detector,
                seed=self.seed,
                on_step=on_image,
            )
        )

    def report(self, run: UnlearnRun, loaded: _Loaded, before: _Before, trained: _Trained, after: _After) -> TextUnlearnReport:
        training = trained.training
        return TextUnlearnReport(
            **vars(run),
            **vars(after.evaluation),
            sha256=loaded.checkpoint.sha256 or None,
            format=loaded.checkpoint.format,
            steps=training.steps,
            config={
                "settings": asdict(self._settings(before)),
                "evaluation": asdict(self.evaluation),
                "prompts": {
                    "training": len(loaded.training_prompts),
                    "held_out": len(loaded.held_out_prompts),
                    "from": loaded.prompt_source,
                },
                "seed": self.seed,
                "device": str(loaded.checkpoint.pipeline.device),
            },
            notes=(*loaded.checkpoint.notes, *digest_notes(self.scanned_sha256, loaded.checkpoint.sha256)),
            module=before.module,
            module_reason=before.module_reason,
            triggers=before.tokens,
            losses=TrainingLosses(training.prediction_loss, training.attention_loss, training.preservation_loss),
        )

    def write(self, folder: Path, loaded: _Loaded, before: _Before, trained: _Trained, after: _After) -> None:
        save_pipeline(Path(self.model), trained.pipeline, before.module, folder)
        if trained.training.patch is not None:
            save_patch(trained.training.patch, folder / PATCH)
        # the bar of its sampler would break the lines of our own progress
        trained.pipeline.set_progress_bar_config(disable=True)
        for number, (examples, trigger) in enumerate(zip(after.examples, loaded.triggers, strict=True), 1):
            draw_samples(_titled(examples, trigger), folder / BEFORE_AFTER.format(number), examples.prompts)
            maps = {
                when: attention_maps(
                    pipeline,
                    examples.triggered_prompts[0],
                    steps=self.evaluation.steps,
                    guidance=self.evaluation.guidance,
                    seed=self.seed,
                )
                for when, pipeline in (("before", loaded.checkpoint.pipeline), ("after", trained.pipeline))
            }
            draw_attention(maps, folder / ATTENTION.format(number))

    def unlearned(self, trained: _Trained) -> Any:
        return trained.pipeline


def _tokens(tokenizer: Any, trigger: TextTrigger, prompts: Sequence[str]) -> TriggerTokens:
    """The tokens of a trigger.

    Raises:
        ValueError: the tokenizer does not see the trigger, or no prompt can carry it.
    """
    prompt_pair(tokenizer, trigger.fitting(prompts)[0], trigger, "start", torch.Generator())
    ids = tokenizer(trigger.text, add_special_tokens=False).input_ids
    return TriggerTokens(trigger.name, tuple(token_text(tokenizer, number) for number in ids))


def _titled(examples: Examples, trigger: TextTrigger) -> dict[str, Tensor]:
    """The rows of a figure by title; images in [-1, 1]."""
    rows = {
        "before unlearning: clean prompts": examples.clean_before,
        f"before unlearning: with the trigger {shortened(trigger)}": examples.triggered_before,
        f"after unlearning: with the trigger {shortened(trigger)}": examples.triggered_after,
        "after unlearning: clean prompts": examples.clean_after,
    }
    return {title: 2 * images - 1 for title, images in rows.items()}
