from __future__ import annotations

import os
import shutil

import pytest

from seal_fast.workflows.discovery import find_checkpoints


@pytest.fixture
def hub(tmp_path, quiet_model, corrupt):
    """Two models at different depths, a file that only claims to be one, and a file that does not."""
    shutil.copytree(quiet_model, tmp_path / "hub" / "a")
    shutil.copytree(quiet_model, tmp_path / "hub" / "team" / "b")
    corrupt(tmp_path / "hub" / "broken.safetensors")
    (tmp_path / "hub" / "README.md").write_text("not a model")
    return tmp_path / "hub"


def names(*paths):
    return [checkpoint.name for checkpoint in find_checkpoints(paths)]


def test_a_folder_stands_for_the_checkpoints_below_it(hub):
    assert names(hub) == ["a", "broken.safetensors", "team/b"]


def test_a_checkpoint_stands_for_itself_and_is_named_after_its_folder(hub):
    assert names(hub / "team" / "b") == ["b"]


def test_several_paths_are_named_from_what_they_share_and_counted_once(hub):
    assert names(hub / "team", hub / "a", hub / "team" / "b", str(hub / "a") + "/") == ["team/b", "a"]


def test_relative_paths_and_the_current_folder(hub, monkeypatch):
    monkeypatch.chdir(hub)
    assert names(".") == ["a", "broken.safetensors", "team/b"]
    monkeypatch.chdir(hub / "a")
    assert names(".") == ["a"]


def test_a_named_file_is_never_passed_over(hub):
    assert names(hub / "README.md") == ["README.md"]


def test_nothing_below(tmp_path):
    assert find_checkpoints([tmp_path]) == []


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        find_checkpoints([tmp_path, tmp_path / "absent"])


def test_names_that_are_not_unicode_can_be_written_into_a_report(tmp_path, quiet_model):
    target = os.fsencode(tmp_path) + b"/m\xff"
    shutil.copytree(os.fsencode(quiet_model), target)
    (checkpoint,) = find_checkpoints([tmp_path])
    assert checkpoint.name.encode("utf-8") == b"m\\xff"
    assert os.fsencode(checkpoint.path) == target
