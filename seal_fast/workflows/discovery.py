"""Find the checkpoints at the paths that a user names."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from seal_fast.checkpoints import discover, identify


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, not loaded yet.

    Attributes:
        path: absolute path of the file or folder.
        name: name of the model in reports: the path relative to the scanned root, with forward slashes.
    """

    path: Path
    name: str


def find_checkpoints(paths: Iterable[str | os.PathLike[str]]) -> list[Checkpoint]:
    """Every checkpoint at or below `paths`, each once, in the order given.

    Raises:
        FileNotFoundError: a path does not exist.
    """
    roots, found = [], {}
    for path in (Path(os.path.abspath(p)) for p in paths):
        below = [Path(os.path.abspath(p)) for p in _at_or_below(path)]
        found.update(dict.fromkeys(below))
        roots.append(path.parent if path in below else path)
    if not found:
        return []
    base = os.path.commonpath(roots)
    return [Checkpoint(path, _printable_bytes(path.relative_to(base).as_posix())) for path in found]


def _at_or_below(path: Path) -> list[Path]:
    """The checkpoints of one path. A file always counts as one, so that naming a file that is none ends in an error result."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file() or identify(path) is not None:
        return [path]
    return discover(path)


def _printable_bytes(name: str) -> str:
    # file names need not be UTF-8, reports must
    return os.fsencode(name).decode("utf-8", "backslashreplace")
