"""The detector of text triggers: search a text-to-image model for texts that activate a backdoor, and decide."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from seal_fast.checkpoints import CheckpointError
from seal_fast.checkpoints.text_to_image import COMPONENTS, PIPELINE, LoadedPipeline, identify, load_pipeline
from seal_fast.results.progress import OnProgress, Progress
from seal_fast.results.scan import DetectorName
from seal_fast.text_to_image.latents import noise_schedule
from seal_fast.text_triggers.findings import Module, TextSearch
from seal_fast.text_triggers.search import find_text_triggers, stages
from seal_fast.text_triggers.search_settings import Budget, TextSearchSettings
from seal_fast.text_triggers.verdict import MODULES, RULES, TextCase
from seal_fast.verdict import decide
from seal_fast.workflows.detector import Findings, Loaded
from seal_fast.workflows.prompts import clean_prompts
from seal_fast.workflows.stage_progress import share_of_work
from seal_fast.workflows.text_trigger_files import TRIGGERS_FILE, TriggersFile, draw_triggers, remove_triggers


@dataclass(frozen=True)
class TextModel:
    """A text-to-image model with what its search needs.

    Attributes:
        pipeline: a StableDiffusionPipeline.
        base: the clean pipeline that it was made from, if there is one.
        modules: modules of the checkpoint that may hold a backdoor; those of a base are clean.
        prompts: clean prompts; every other one is held out.
    """

    pipeline: Any
    base: Any
    modules: tuple[Module, ...]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class TextScan:
    """Scans a text-to-image model for text triggers.

    Attributes:
        base: folder of the clean pipeline, which the model is compared with. It also completes a checkpoint that is a UNet or a
            text encoder alone.
        prompts: clean prompts; None for those of the model card, else shipped ones (`seal_fast.workflows.prompts`).
        settings: settings of the search.
        budget: where a search ends before it is complete.
        seed: seed of all noise.
    """

    base: Path | None = None
    prompts: tuple[str, ...] | None = None
    settings: TextSearchSettings = field(default_factory=TextSearchSettings)
    budget: Budget = field(default_factory=Budget)
    seed: int = 0

    @property
    def name(self) -> DetectorName:
        return "text"

    @property
    def config(self) -> dict[str, Any]:
        """Base and prompts may differ between models, so they are part of `Loaded.config_sha256`."""
        return {"settings": asdict(self.settings), "budget": asdict(self.budget)}

    def accepts(self, path: Path) -> bool:
        try:
            return identify(path) is not None
        except CheckpointError:
            return False

    def load(self, path: Path, device: str) -> Loaded[TextModel]:
        alone = identify(path) in COMPONENTS
        loaded = load_pipeline(path, base=self.base if alone else None, device=device)
        base = None if self.base is None else self._load_base(device)
        prompts, notes = clean_prompts(self.prompts, self.base if alone else path)
        modules: tuple[Module, ...] = (COMPONENTS[loaded.format],) if alone else MODULES
        digest = _digest([loaded.config_sha256, base and (base.sha256, base.config_sha256), prompts])
        model = TextModel(loaded.pipeline, base and base.pipeline, modules, tuple(prompts))
        return Loaded(
            model, loaded.sha256, loaded.format, noise_schedule(loaded.pipeline).family, digest, (*loaded.notes, *notes)
        )

    def _load_base(self, device: str) -> LoadedPipeline:
        assert self.base is not None
        if identify(self.base) != PIPELINE:
            raise CheckpointError(self.base, "no text-to-image pipeline, which a base must be")
        return load_pipeline(self.base, device=device)

    def search(self, loaded: Loaded[TextModel], at: Progress, on_progress: OnProgress) -> TextSearch:
        model = loaded.model
        return find_text_triggers(
            model.pipeline,
            model.prompts,
            base=model.base,
            settings=self.settings,
            budget=self.budget,
            seed=self.seed,
            on_step=share_of_work(
                stages(model.pipeline, model.prompts, self.settings, model.base is not None), at, on_progress
            ),
        )

    def findings(self, loaded: Loaded[TextModel], search: TextSearch) -> Findings:
        decision = decide(RULES, TextCase.of(search, loaded.model.modules))
        return Findings(decision, search.scope, search.evidence, search.tried, search.found)

    def save_triggers(self, loaded: Loaded[TextModel], search: TextSearch, folder: Path) -> str | None:
        if not search.found:
            remove_triggers(folder)
            return None
        TriggersFile(loaded.sha256, search.found).save(folder / TRIGGERS_FILE)
        return TRIGGERS_FILE

    def save_images(self, loaded: Loaded[TextModel], search: TextSearch, folder: Path) -> None:
        draw_triggers(loaded.model.pipeline, search.found, loaded.model.prompts[1::2], self.settings, self.seed, folder)


def _digest(parts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
