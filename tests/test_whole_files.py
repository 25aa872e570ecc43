"""A file is there as it was before, or whole."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
from workflow import leave_behind

from vicreg_hf.whole_files import clear_leftovers, replacing


def test_a_file_is_replaced_once_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with replacing(path) as aside:
        aside.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_file_and_names_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most))
    try:
        with pytest.raises(OSError, match=rf"File too large: '{path}'"), replacing(path) as aside:
            aside.write_text("after" * 4096)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_another_failure_is_raised_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"), replacing(tmp_path / "file"):
        (tmp_path / "absent").read_text()
    with pytest.raises(LookupError), replacing(tmp_path / "file") as aside:  # noqa: PT012
        aside.write_text("half")
        raise LookupError
    assert list(tmp_path.iterdir()) == []


def test_what_was_left_long_ago_is_removed_and_nothing_else(tmp_path: Path) -> None:
    old, young = leave_behind(tmp_path, hours=2), leave_behind(tmp_path, hours=0)
    (tmp_path / "results.json").touch()
    os.utime(tmp_path / "results.json", (0, 0))
    clear_leftovers(tmp_path)
    assert not old.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", young.name}
