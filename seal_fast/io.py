"""Write files so that a reader never sees half of one."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Replace a file whole: `write` gets a temporary path, whose file is renamed to `path` once it is complete.

    The temporary file lies in the same folder, since only a rename within one file system is atomic. Its name is random, so
    that two processes, or a folder of that name, are not in each other's way. It keeps the suffix of `path`, since some writers
    take the format from it. Missing parents are created. An error leaves the old file as it was, and no temporary one.

    Args:
        path: file to write.
        write: writes the content to the path it is called with.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
