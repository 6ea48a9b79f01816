"""The one error of this package."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from seal_fast.printable import printable

LONGEST_REASON = 1000
"""A reason may repeat what a file holds, which may be long."""


class CheckpointError(Exception):
    """A checkpoint that is refused, broken or not supported.

    Attributes:
        path: the file or folder at fault.
        reason: what is wrong with it, in one line of at most LONGEST_REASON characters that cannot control a terminal.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        self.path = Path(path)
        self.reason = printable(reason[:LONGEST_REASON])[:LONGEST_REASON]
        super().__init__(f"{path}: {self.reason}")


@contextmanager
def refusing(path: Path, doing: str) -> Iterator[None]:
    """Turn any failure of the block into a CheckpointError about `path`.

    The parsers in the block were not written for hostile bytes and document no complete list of exceptions. Whatever they raise
    must cost one checkpoint, not the run. The panic of a parser in Rust is no `Exception`.
    """
    try:
        yield
    except (CheckpointError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        first_line = (str(error).strip().splitlines() or [""])[0][:200]
        raise CheckpointError(path, f"{doing} ({type(error).__name__}: {first_line})") from error
