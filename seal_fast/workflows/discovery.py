"""From the paths a user names to the checkpoints to scan."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from seal_fast.checkpoints import discover, identify


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to scan and the name reports give it: its path relative to what was scanned."""

    path: Path
    name: str


def _below(path: Path) -> list[Path]:
    """Checkpoints a path stands for. A file that is none stands for itself, so that naming it ends in an error row."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file() or identify(path) is not None:
        return [path]
    return discover(path)


def _printable_bytes(name: str) -> str:
    # file names need not be UTF-8, reports must
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def find_candidates(paths: Iterable[str | os.PathLike[str]]) -> list[Candidate]:
    """Every checkpoint at or below `paths`, each once, in the order given.

    Raises:
        FileNotFoundError: a path does not exist.
    """
    roots, found = [], {}
    for path in (Path(os.path.abspath(p)) for p in paths):
        below = [Path(os.path.abspath(p)) for p in _below(path)]
        found.update(dict.fromkeys(below))
        roots.append(path.parent if path in below else path)
    if not found:
        return []
    base = os.path.commonpath(roots)
    return [Candidate(path, _printable_bytes(path.relative_to(base).as_posix())) for path in found]
