"""The triggers that a scan found, as `seal-fast unlearn --found` takes them from the folder of a scanned model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from seal_fast.checkpoints import CheckpointError
from seal_fast.checkpoints.files import inside
from seal_fast.checkpoints.tensor_file import read_tensors
from seal_fast.text_triggers.findings import Module
from seal_fast.text_triggers.trigger import Position, TextTrigger
from seal_fast.workflows.text_trigger_files import TRIGGERS_FILE, TriggersFile
from seal_fast.workflows.trigger_files import TRIGGER_FILE


@dataclass(frozen=True)
class TextTriggers:
    """Text triggers to unlearn.

    Attributes:
        triggers: the triggers; of a scan, the strongest first.
        positions: where a scan confirmed each; None for triggers of another source.
        needed_words: for each the word without which a prompt hardly responds, see `FoundTrigger.word`; None for triggers of
            another source.
        model_sha256: digest of the weights of the model that was scanned; None for triggers of another source.
        module: the module in which a scan found all of them; None if they are in both, or of another source.
    """

    triggers: tuple[TextTrigger, ...]
    positions: tuple[Position, ...] | None = None
    needed_words: tuple[str | None, ...] | None = None
    model_sha256: str | None = None
    module: Module | None = None


@dataclass(frozen=True)
class NoiseTriggers:
    """Noise triggers to unlearn.

    Attributes:
        files: their files.
        model_sha256: digest of the weights of the model that was scanned; None if the file does not say.
    """

    files: tuple[Path, ...]
    model_sha256: str | None = None


def read_found(folder: Path) -> TextTriggers | NoiseTriggers:
    """What a scan found in one model. Safe for folders of unknown origin.

    Args:
        folder: DIR/<model> of `seal-fast scan --out DIR`.

    Raises:
        CheckpointError: the folder holds no trigger, or triggers of both kinds; or the file is refused.
    """
    text, noise = inside(folder, TRIGGERS_FILE), inside(folder, TRIGGER_FILE)
    if text and noise:
        raise CheckpointError(folder, f"holds {TRIGGERS_FILE} and {TRIGGER_FILE}: scan again into a new folder")
    if text:
        file = TriggersFile.load(text)
        triggers, positions, words = zip(*((one.trigger, one.position, one.word) for one in file.triggers), strict=True)
        modules = {found.module for found in file.triggers}
        return TextTriggers(triggers, positions, words, file.model_sha256, modules.pop() if len(modules) == 1 else None)
    if noise:
        return NoiseTriggers((noise,), read_tensors(noise)[1].get("model_sha256"))
    raise CheckpointError(folder, f"no trigger of a scan: neither {TRIGGERS_FILE} nor {TRIGGER_FILE}")


def digest_notes(scanned: str | None, sha256: str) -> tuple[str, ...]:
    """A note if the model is not the one that was scanned. It need not be: a copy in half precision has another digest."""
    if scanned is None or scanned == sha256:
        return ()
    return ("the triggers were found in a model with other weights: check that this model responds to them",)
