"""Read the pickle of a torch.save archive, if Python's zip reader and torch's cannot disagree on what the archive holds.

The pickle is checked through Python's `zipfile`, and opened by torch, whose reader (miniz) is another program. An archive can
be made that looks different to the two. Where a rule leaves room for that, the archive is refused:

    end of the file      a directory, directly followed by [its zip64 record and that record's locator and] the end record
    end record           no comment; names the directory's true offset, size and number of members
    members              stored, with different names also if case does not count, no NUL in a name

zipfile finds a directory by its end and miniz by the offset that the end record names, zipfile shortens names at a NUL, and
miniz ignores case.
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

from seal_fast.checkpoints.errors import CheckpointError

MAX_PICKLE_BYTES = 4 << 20
"""Limit for the pickle alone, without the tensors' data. That of a TrojDiff list with optimiser state has 0.4 MB."""
MAX_DIRECTORY_BYTES = 8 << 20
"""A directory has about 70 bytes for each tensor. zipfile reads one of 50 MB in 7 s and 0.5 GB."""

END = struct.Struct("<4s4H2LH")
"""End record: mark, two disks, two numbers of members, size and offset of the directory, length of the comment."""
LOCATOR = struct.Struct("<4sLQL")
"""Locator of the zip64 record: mark, disk, offset, disks."""
ZIP64 = struct.Struct("<4sQ2H2L4Q")
"""zip64 record: mark, length, two versions, two disks, two numbers of members, size and offset of the directory."""
END_MARK, LOCATOR_MARK, ZIP64_MARK = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"


def zip_pickle(path: Path, size: int) -> bytes:
    """The pickle of a torch.save archive of `size` bytes.

    Raises:
        CheckpointError: the archive is over a limit, compressed, or not of the form that torch.save writes.
        Exception: whatever the parsers raise for damaged bytes.
    """
    count = _checked_directory(path, size)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED for m in members):
            raise CheckpointError(path, "compressed members, which torch.save never writes: a possible zip bomb")
        if sum(m.file_size for m in members) > size:
            raise CheckpointError(path, "members claim more bytes than the file has: a possible zip bomb")
        if len({m.filename.lower() for m in members}) != len(members):
            raise CheckpointError(path, "two archive members share a name")
        if len(members) != count or any(m.orig_filename != m.filename for m in members):
            raise _ambiguous(path)
        pickles = [m for m in members if m.filename.rpartition("/")[2].lower() == "data.pkl"]
        if len(pickles) != 1:
            raise CheckpointError(path, f"a zip archive with {len(pickles)} data.pkl, not one: not written by torch.save")
        if pickles[0].file_size > MAX_PICKLE_BYTES:
            raise CheckpointError(path, f"a pickle of {pickles[0].file_size} bytes, more than the limit of {MAX_PICKLE_BYTES}")
        return archive.read(pickles[0])


def _checked_directory(path: Path, size: int) -> int:
    """The number of members, from a directory that stands where its end record says and where the end of the file says."""
    with path.open("rb") as file:
        file.seek(max(0, size - ZIP64.size - LOCATOR.size - END.size))
        tail = file.read()
    end = tail[-END.size :]
    if len(end) < END.size or not end.startswith(END_MARK):
        raise CheckpointError(path, "no zip archive that torch.save wrote, or cut short: it does not end with an end record")
    _, disk, first_disk, here, count, length, offset, comment = END.unpack(end)
    after = size - END.size
    locator = tail[-END.size - LOCATOR.size : -END.size]
    if locator.startswith(LOCATOR_MARK):
        after -= LOCATOR.size + ZIP64.size
        record = tail[: ZIP64.size]
        if LOCATOR.unpack(locator)[1:] != (0, after, 1) or len(record) < ZIP64.size or not record.startswith(ZIP64_MARK):
            raise _ambiguous(path)
        narrow = (here, count, length, offset)
        _, own_length, *_versions, disk, first_disk, here, count, length, offset = ZIP64.unpack(record)
        wide = (here, count, length, offset)
        agree = (a in (b, limit) for a, b, limit in zip(narrow, wide, (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF), strict=True))
        if own_length != ZIP64.size - 12 or not all(agree):
            raise _ambiguous(path)
    if (disk, first_disk, comment) != (0, 0, 0) or here != count or offset + length != after:
        raise _ambiguous(path)
    if length > MAX_DIRECTORY_BYTES:
        raise CheckpointError(path, f"a zip directory of {length} bytes, more than the limit of {MAX_DIRECTORY_BYTES}")
    return count


def _ambiguous(path: Path) -> CheckpointError:
    return CheckpointError(
        path,
        "refused: its zip directory can be read in two ways, which torch.save never writes; "
        "ask its author for a state dict in safetensors",
    )
