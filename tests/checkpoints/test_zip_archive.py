"""An archive is read only if Python's zip reader and torch's see the same one; torch's own reader is asked for comparison."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seal_fast.checkpoints import CheckpointError
from seal_fast.checkpoints.zip_archive import END, LOCATOR, MAX_DIRECTORY_BYTES, zip_pickle

INNOCENT, EVIL = pickle.dumps({"a": 11}, 2), pickle.dumps({"a": 22}, 2)


def archive(content: bytes, name: str = "archive/data.pkl", **others: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as written:
        for member, data in {name: content, "archive/version": b"3\n", **others}.items():
            written.writestr(zipfile.ZipInfo(member), data)
    return stream.getvalue()


def directory_of(data: bytes) -> int:
    return END.unpack(data[-END.size :])[6]


def two_directories() -> bytes:
    """zipfile takes the directory before the end record, torch the one at the offset that the record names."""
    innocent, evil = archive(INNOCENT), archive(EVIL)
    assert len(innocent) == len(evil)
    return evil[: -END.size] + innocent[: -END.size] + evil[-END.size :]


def shifted(data: bytes) -> bytes:
    """An end record that counts from a later start, which zipfile allows for."""
    end = list(END.unpack(data[-END.size :]))
    end[6] -= 10
    return data[: -END.size] + END.pack(*end)


def with_end(data: bytes, place: int, value: int) -> bytes:
    end = list(END.unpack(data[-END.size :]))
    end[place] = value
    return data[: -END.size] + END.pack(*end)


def commented(data: bytes) -> bytes:
    """A comment that is an archive's end itself."""
    inner = archive(EVIL)[-END.size :]
    return with_end(data, 7, len(inner)) + inner


def torch_save(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def other_zip64(data: bytes) -> bytes:
    """A locator that names another place than the one before it, where zipfile looks."""
    changed = bytearray(data)
    changed[-END.size - LOCATOR.size + 8] ^= 1
    return bytes(changed)


FORGED: dict[str, tuple[Callable[[], bytes], str]] = {
    "two directories": (two_directories, "two ways"),
    "shifted directory": (lambda: shifted(archive(INNOCENT)), "two ways"),
    "fewer members than entries": (lambda: with_end(with_end(archive(INNOCENT), 4, 1), 3, 1), "two ways"),
    "several disks": (lambda: with_end(archive(INNOCENT), 1, 1), "two ways"),
    "end record as comment": (lambda: commented(archive(INNOCENT)), "two ways|end record"),
    "bytes after the end": (lambda: archive(INNOCENT) + bytes(7), "end record"),
    "names that differ in case": (lambda: archive(INNOCENT, **{"archive/DATA.PKL": EVIL}), "share a name"),
    "NUL in a name": (lambda: archive(INNOCENT).replace(b"archive/version", b"archive/versi\0n"), "two ways"),
    "other zip64 record": (lambda: other_zip64(torch_save(1)), "two ways"),
    "large directory": (
        lambda: archive(INNOCENT, **{f"archive/{number}": b"" for number in range(MAX_DIRECTORY_BYTES // 50)}),
        "zip directory of",
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_an_archive_that_two_readers_may_see_differently_is_refused(tmp_path: Path, name: str) -> None:
    forge, reason = FORGED[name]
    path = tmp_path / "model.pt"
    path.write_bytes(forge())
    with pytest.raises(CheckpointError, match=reason):
        zip_pickle(path, path.stat().st_size)


def test_the_two_readers_disagree_on_two_directories() -> None:
    data = two_directories()
    assert zipfile.ZipFile(io.BytesIO(data)).read("archive/data.pkl") == INNOCENT
    assert torch._C.PyTorchFileReader(io.BytesIO(data)).get_record("data.pkl") == EVIL


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_read_is_what_torch_reads(tmp_path: Path, data: st.DataObject) -> None:
    """Damaged archives of torch.save and of zipfile, mostly in the directory: each is refused, or read as torch reads it."""
    whole = data.draw(st.sampled_from([torch_save({"a": torch.ones(3)}), archive(INNOCENT), two_directories()]), "archive")
    damaged = bytearray(whole)
    near_the_end = st.integers(max(0, len(whole) - 600), len(whole) - 1)
    for place in data.draw(st.lists(near_the_end, max_size=3), "flipped"):
        damaged[place] = data.draw(st.integers(0, 255), "byte")
    path = tmp_path / "damaged.pt"
    path.write_bytes(damaged)
    try:
        got = zip_pickle(path, len(damaged))
        torchs = torch._C.PyTorchFileReader(io.BytesIO(damaged))
        want = torchs.get_record("data.pkl")
    except Exception:
        return
    assert got == want
