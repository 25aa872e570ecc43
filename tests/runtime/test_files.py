"""A file is there as it was before, or whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from families import config
from workflow import leave_behind, small_files

from vicreg_hf import VICRegModel
from vicreg_hf.publishing.publish import check_exportable
from vicreg_hf.runtime.files import clear_leftovers, replacing, writing


def test_a_file_is_replaced_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    message = rf"File too large: '{path}'"
    with small_files(4096), pytest.raises(OSError, match=message), replacing(path) as aside:
        aside.write_text("after" * 4096)
    with pytest.raises(LookupError), replacing(path) as aside:  # noqa: PT012
        aside.write_text("half")
        raise LookupError
    with pytest.raises(FileNotFoundError, match="absent"), replacing(path):
        (tmp_path / "absent").read_text()
    with replacing(path) as aside:
        aside.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_left_long_ago_is_removed_and_nothing_else(tmp_path: Path) -> None:
    old, young = leave_behind(tmp_path, hours=2), leave_behind(tmp_path, hours=0)
    (tmp_path / "results.json").touch()
    os.utime(tmp_path / "results.json", (0, 0))
    clear_leftovers(tmp_path)
    assert not old.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", young.name}


def test_only_what_concerns_a_directory_is_blamed_on_it(tmp_path: Path) -> None:
    directory = tmp_path / "out"
    sentence = rf"cache_dir must be a directory that can be written, got {directory}: .* Free it."
    cache = writing(directory, "cache_dir", remedy="Free it.")
    with pytest.raises(ValueError, match=sentence), cache:
        (directory / "file").open("w")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="must be a directory"), writing(tmp_path / "file" / "out"):
        (tmp_path / "file" / "out").mkdir()
    with pytest.raises(FileNotFoundError), writing(directory):
        (tmp_path / "data").read_text()


@pytest.mark.parametrize("most", [4096, 100_000])  # of the config, of the weights
def test_a_temporary_folder_without_room_is_named(most: int) -> None:
    sentence = r"temporary folder .* must have room for an encoder, .*large.* set TMPDIR"
    with small_files(most), pytest.raises(OSError, match=sentence):
        check_exportable(VICRegModel(config()))
