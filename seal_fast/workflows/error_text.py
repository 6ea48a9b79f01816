"""The text of an error as reports show it."""

from __future__ import annotations

import os

from seal_fast.checkpoints import CheckpointError
from seal_fast.workflows.discovery import Checkpoint


def in_one_line(error: Exception, checkpoint: Checkpoint) -> str:
    """The text of an error without the absolute path, which reports must not hold."""
    if isinstance(error, CheckpointError):
        part = os.path.relpath(error.path, checkpoint.path)
        text = error.reason if part == "." else f"{part}: {error.reason}"
    else:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return text.replace(os.fspath(checkpoint.path), checkpoint.name)
