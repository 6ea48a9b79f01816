"""Bounded access to the files of an untrusted checkpoint: their location, their size, JSON, and hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from seal_fast.checkpoints.errors import CheckpointError, refusing

MAX_WEIGHT_BYTES = 16 << 30
"""Size limit of a weight file. The largest unconditional UNet in use has 0.5 GB, and TrojDiff stores four copies of one."""
MAX_JSON_BYTES = 1 << 20


def holds(folder: Path, name: str) -> bool:
    """Whether the folder has such an entry, be it a broken link.

    Raises:
        CheckpointError: this cannot be told, for instance without permission.
    """
    path = folder / name
    with refusing(path, "cannot be reached"):
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def inside(folder: Path, name: str) -> Path | None:
    """`folder / name`, or None if there is no such entry.

    Raises:
        CheckpointError: the entry cannot be reached, lies outside `folder` (symbolic links followed), or is not a regular file.
    """
    if not holds(folder, name):
        return None
    path = folder / name
    with refusing(path, "broken link"):
        real = path.resolve(strict=True)
    if not real.is_relative_to(folder.resolve()):
        raise CheckpointError(path, "a link that leaves the checkpoint folder; copy the file into it if it belongs there")
    # opening a FIFO would wait for ever
    if not real.is_file():
        raise CheckpointError(path, "not a regular file")
    return path


def weight_size(path: Path) -> int:
    """Size of a weight file in bytes.

    Raises:
        CheckpointError: the file cannot be reached, is not a regular file, is empty, or is larger than MAX_WEIGHT_BYTES.
    """
    with refusing(path, "cannot be reached"):
        if not path.is_file():
            raise CheckpointError(path, "not a regular file")
        size = path.stat().st_size
    if size == 0:
        raise CheckpointError(path, "empty file")
    if size > MAX_WEIGHT_BYTES:
        raise CheckpointError(path, f"{size} bytes, more than the limit of {MAX_WEIGHT_BYTES}")
    return size


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object in UTF-8; CheckpointError for anything else, including too deep nesting."""
    with refusing(path, "not readable as JSON"):
        value = json.loads(data.decode("utf-8"))
    if not isinstance(value, dict):
        raise CheckpointError(path, f"a JSON object was expected, not {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most MAX_JSON_BYTES; CheckpointError otherwise."""
    with refusing(path, "cannot be read"), path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(path, f"more than {MAX_JSON_BYTES} bytes of JSON")
    return parse_json(data, path)


def sha256(files: Iterable[Path]) -> str:
    """Hex digest of the contents of `files`, one after the other; names and folders do not count."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
