"""One run at a time in an output_dir."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from gloo import GlooPool

from vicreg_hf.runtime import output_dir
from vicreg_hf.runtime.distributed import OtherProcessFailed, rank
from vicreg_hf.runtime.output_dir import check_shared, claim


@contextmanager
def forked(*claimed: Path) -> Iterator[None]:
    """A process beside this one, which claims directories and is killed at the end."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with ExitStack() as stack:
            for directory in claimed:
                stack.enter_context(claim(directory))
            os.write(writing, b"1")
            signal.pause()
    try:
        os.read(reading, 1)
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


def look(*folders: Path) -> str:
    """Each process looks into a folder of its own."""
    try:
        check_shared(folders[rank()])
    except (ValueError, OtherProcessFailed) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_directory_that_processes_do_not_share_is_refused(gloo: GlooPool, tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    own.mkdir()
    other.mkdir()
    assert gloo.run(2, look, own, own) == ["", ""]
    for second, why in ((other, "sees no file of the main process"), (tmp_path / "a", "cannot")):
        first_said, second_said = gloo.run(2, look, own, second)
        assert first_said.startswith("OtherProcessFailed")
        assert second_said.startswith(f"ValueError: every process must write to the same {second}")
        assert why in second_said
    assert not [*own.iterdir(), *other.iterdir()]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_dir, "LOCK_PATIENCE", 0.2)


def test_a_directory_is_for_one_run_until_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "made" / "if absent"
    sentence = rf"must not be in use by another run, and {directory} is; wait for it, stop it, or"
    with forked(directory):
        with pytest.raises(ValueError, match=sentence), claim(directory):
            pass
        monkeypatch.setenv("RANK", "1")  # the main process has claimed it for the others
        with claim(directory):
            pass
        monkeypatch.delenv("RANK")
    for _ in range(2):  # however a process ends, its claim ends with it
        with claim(directory):
            pass


def test_a_worker_that_outlives_its_run_holds_no_claim(tmp_path: Path) -> None:
    with ExitStack() as worker:
        with claim(tmp_path):
            worker.enter_context(forked())
        with claim(tmp_path):
            pass


def test_a_file_system_without_locks_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claim(tmp_path):
        (tmp_path / "file").touch()
