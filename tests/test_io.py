from __future__ import annotations

import pytest

from seal_fast.io import write_atomically


def test_the_file_appears_whole_and_alone(tmp_path):
    target = tmp_path / "new" / "folder" / "report.json"

    def write(path):
        path.write_text("first half, ")
        assert not target.exists()
        path.write_text("first half, second half")

    write_atomically(target, write)
    assert target.read_text() == "first half, second half"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file_and_no_temporary_one(tmp_path, error):
    target = tmp_path / "report.json"
    target.write_text("old")

    def write(path):
        path.write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_atomically(target, write)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_in_the_way_stays(tmp_path):
    target = tmp_path / "report.json"
    target.mkdir()
    with pytest.raises(OSError, match=r"report\.json"):
        write_atomically(target, lambda path: path.touch())
    assert list(tmp_path.iterdir()) == [target]


def test_writers_do_not_share_a_temporary_name_and_see_the_suffix(tmp_path):
    seen = []

    def write(path):
        seen.append(path)
        path.touch()
        if len(seen) < 5:
            write_atomically(tmp_path / "trigger.png", write)

    write_atomically(tmp_path / "trigger.png", write)
    assert len(set(seen)) == 5
    assert {(path.parent, path.suffix) for path in seen} == {(tmp_path, ".png")}
