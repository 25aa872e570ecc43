"""One run at a time in an output_dir, and what was there before set aside."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from vicreg_hf.runtime import output_dir
from vicreg_hf.runtime.output_dir import claim, set_aside


def start_holder(directory: Path) -> int:
    """The number of a process that has claimed a directory, and holds it until it is killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with claim(directory):
            os.write(writing, b"1")
            signal.pause()
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    return child


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_directory_is_for_one_run_until_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_dir, "LOCK_PATIENCE", 0.2)
    directory = tmp_path / "made" / "if absent"
    child = start_holder(directory)
    sentence = rf"must not be in use by another run, and {directory} is; wait for it, stop it, or"
    try:
        with pytest.raises(ValueError, match=sentence), claim(directory):
            pass
        monkeypatch.setenv("RANK", "1")  # the main process has claimed it for the others
        with claim(directory):
            pass
        monkeypatch.delenv("RANK")
    finally:
        end(child)
    for _ in range(2):  # however a process ends, its claim ends with it
        with claim(directory):
            pass


def test_a_worker_that_outlives_its_run_holds_no_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_dir, "LOCK_PATIENCE", 0.2)
    with claim(tmp_path):
        worker = os.fork()
        if not worker:
            signal.pause()
    try:
        with claim(tmp_path):
            pass
    finally:
        end(worker)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_written_to(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claim(tmp_path):
        (tmp_path / "file").touch()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match="output_dir must be a directory that can be written"),
        claim(tmp_path / "file" / "run"),
    ):
        pass


def test_what_was_there_is_set_aside_under_the_next_number(tmp_path: Path) -> None:
    (tmp_path / "earlier-1").mkdir()
    (tmp_path / "log").write_text("old")
    said: list[object] = []
    set_aside(tmp_path, ["log", "absent"], said.append)
    set_aside(tmp_path, ["log"], said.append)
    assert (tmp_path / "earlier-2" / "log").read_text() == "old"
    assert said == [f"What was in {tmp_path} before is now in {tmp_path / 'earlier-2'}: log."]
