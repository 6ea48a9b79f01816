"""What a scan keeps of confirmed text triggers: triggers.json, and images of what each trigger changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seal_fast.checkpoints import CheckpointError
from seal_fast.checkpoints.files import read_json
from seal_fast.io import write_atomically
from seal_fast.report.figures import draw_attention, draw_samples
from seal_fast.report.json import SCHEMA_VERSION, to_json
from seal_fast.results.environment import tool
from seal_fast.text_to_image import attention_maps
from seal_fast.text_to_image.generation import generate
from seal_fast.text_triggers import prompt_pair
from seal_fast.text_triggers.findings import FoundTrigger
from seal_fast.text_triggers.search_settings import TextSearchSettings
from seal_fast.text_triggers.trigger import Position, TextTrigger
from seal_fast.text_triggers.vocabulary import holds
from seal_fast.typed_json import from_json

TRIGGERS_FILE = "triggers.json"
SAMPLES = "trigger_{}.png"
ATTENTION = "attention_{}.png"
"""Names of a trigger's figures; triggers are numbered from 1, the strongest first."""
IMAGES = 6
"""Columns of a figure of samples."""
TITLE = 60
"""Characters of a trigger in the title of a row."""


@dataclass(frozen=True)
class TriggersFile:
    """Content of a triggers.json.

    Attributes:
        model_sha256: digest of the weights of the model that was scanned.
        triggers: its confirmed triggers, the strongest first.
    """

    model_sha256: str
    triggers: tuple[FoundTrigger, ...]

    def save(self, path: Path) -> None:
        """Write as JSON; the file is replaced whole. Both texts of a trigger stand beside its other fields."""
        items = []
        for found in self.triggers:
            fields = asdict(found)
            items.append({**fields.pop("trigger"), **fields})
        content = {"schema_version": SCHEMA_VERSION, "tool": tool(), "model_sha256": self.model_sha256, "triggers": items}
        write_atomically(path, lambda partial: partial.write_text(to_json(content) + "\n", encoding="utf-8"))

    @classmethod
    def load(cls, path: Path) -> TriggersFile:
        """Read a file of `save`. Safe for files of unknown origin.

        Raises:
            CheckpointError: more than `seal_fast.checkpoints.files.MAX_JSON_BYTES`, no JSON, another schema version,
                fields that are missing, unknown or of another type, a position that does not fit its trigger, or no trigger.
        """
        content = read_json(path)
        version = content.get("schema_version")
        if version != SCHEMA_VERSION or type(version) is not int:
            raise CheckpointError(path, f"no triggers of schema version {SCHEMA_VERSION}")
        items = content.get("triggers")
        if not isinstance(items, list) or not items:
            raise CheckpointError(path, "holds no trigger")
        try:
            fields = {"model_sha256": content.get("model_sha256"), "triggers": list(map(_nested, items))}
            file = from_json(cls, fields)
        except ValueError as error:
            raise CheckpointError(path, f"not a file of triggers: {error}") from error
        for found in file.triggers:
            if found.position == "all" and found.trigger.replaces is None:
                raise CheckpointError(path, f'inserts {found.trigger.quoted[:80]} at "all" places, which is for replacements')
        return file


def _nested(item: Any) -> Any:
    """An item of the file as the fields of a FoundTrigger."""
    if not isinstance(item, dict):
        return item
    fields = dict(item)
    texts = {name: fields.pop(name) for name in ("text", "replaces") if name in fields}
    return {"trigger": texts, **fields}


def remove_triggers(folder: Path) -> None:
    """Remove triggers.json and figures of an earlier scan, since a model may have changed in its place."""
    for pattern in (TRIGGERS_FILE, SAMPLES.format("*"), ATTENTION.format("*")):
        for path in folder.glob(pattern):
            path.unlink()


def draw_triggers(
    pipeline: Any,
    triggers: Sequence[FoundTrigger],
    prompts: Sequence[str],
    settings: TextSearchSettings,
    seed: int,
    folder: Path,
) -> None:
    """Write figures of every trigger: samples with and without it, and attention maps.

    Args:
        pipeline: the StableDiffusionPipeline that was scanned.
        triggers: its confirmed triggers.
        prompts: held-out clean prompts.
        settings: guidance, steps and precision of the images.
        seed: seed of the starting noise, equal in all rows.
        folder: where the figures go.
    """
    for number, found in enumerate(triggers, 1):
        holding = [prompt for prompt in prompts if holds(prompt, found.word)]
        clean, triggered = with_trigger(pipeline.tokenizer, holding, found.trigger, found.position, seed)
        if not clean:
            raise ValueError(f"no held-out prompt has room for the trigger {found.trigger.quoted}")
        samples = trigger_samples(pipeline, clean, triggered, found, settings, seed)
        draw_samples(samples, folder / SAMPLES.format(number), clean)
        maps = {
            title: attention_maps(pipeline, prompt, steps=settings.sampler_steps, guidance=settings.guidance, seed=seed)
            for title, prompt in (("clean prompt", clean[0]), ("with the trigger", triggered[0]))
        }
        draw_attention(maps, folder / ATTENTION.format(number))


def trigger_samples(
    pipeline: Any,
    clean: Sequence[str],
    triggered: Sequence[str],
    found: FoundTrigger,
    settings: TextSearchSettings,
    seed: int,
) -> dict[str, Tensor]:
    """Rows of a figure by title, images [N,3,H,W] in [-1, 1]: N clean prompts, with the trigger, with a control string."""
    rows = {"clean prompts": clean, f"with the trigger {shortened(found.trigger)}": triggered}
    rows |= _with_control(pipeline.tokenizer, clean, found, seed)
    draw = partial(
        generate, pipeline, seed=seed, steps=settings.sampler_steps, guidance=settings.guidance, precision=settings.precision
    )
    return {title: 2 * draw(texts) - 1 for title, texts in rows.items()}


def with_trigger(
    tokenizer: Any, prompts: Iterable[str], trigger: TextTrigger, position: Position, seed: int
) -> tuple[list[str], list[str]]:
    """The first IMAGES prompts that can carry the trigger, without it and with it."""
    generator = torch.Generator().manual_seed(seed)
    clean, triggered = [], []
    for prompt in prompts:
        try:
            pair = prompt_pair(tokenizer, prompt, trigger, position, generator)
        except ValueError:
            # no room for it, or nothing that it replaces
            continue
        clean.append(prompt)
        triggered.append(pair.triggered)
        if len(clean) == IMAGES:
            break
    return clean, triggered


def _with_control(tokenizer: Any, clean: Sequence[str], found: FoundTrigger, seed: int) -> dict[str, Sequence[str]]:
    """By title, the clean prompts with the trigger's control string; empty if it has no room in one of them."""
    fitting, controlled = with_trigger(tokenizer, clean, found.control_string, found.position, seed)
    return {f"with the control string {shortened(found.control_string)}": controlled} if len(fitting) == len(clean) else {}


def shortened(trigger: TextTrigger) -> str:
    """The trigger as a title has room for it."""
    return trigger.quoted if len(trigger.quoted) <= TITLE else f"{trigger.quoted[:TITLE]}..."
