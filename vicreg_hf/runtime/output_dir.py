"""The directory of a run: one run in it at a time, and room for what the next one writes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from vicreg_hf.runtime.files import writing

LOCK = ".lock"
LOCK_PATIENCE = 5.0
"""Seconds to wait for a run that is just ending."""


@contextmanager
def claim(directory: Path) -> Iterator[None]:
    """Keep other runs out of a directory, which is made if absent.

    The main process of a run locks a file in it, unless the file system has no locks. The lock
    ends with the process, however that ends.

    Raises:
        ValueError: the directory cannot be written, or another run is in it and does not end
            within `LOCK_PATIENCE`.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / LOCK).touch()
    lock = FileLock(directory / LOCK, timeout=LOCK_PATIENCE, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"output_dir must not be in use by another run, and {directory} is; wait for it, stop "
            "it, or choose another output_dir."
        ) from error
    except OSError:  # the file system has no locks
        pass
    try:
        yield
    finally:
        lock.release()


def set_aside(directory: Path, names: Iterable[str], say: Callable[[str], object]) -> None:
    """Move those of some files and folders that are there into `earlier-N`, and say so."""
    found = [name for name in names if (directory / name).exists()]
    if not found:
        return
    number = next(n for n in itertools.count(1) if not (directory / f"earlier-{n}").exists())
    place = directory / f"earlier-{number}"
    place.mkdir()
    for name in found:
        (directory / name).rename(place / name)
    say(f"What was in {directory} before is now in {place}: {', '.join(found)}.")
