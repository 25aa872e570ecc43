"""One run at a time in an output_dir."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vicreg_hf.runtime.files import writing

try:
    import fcntl
except ImportError:
    fcntl = None

LOCK = ".lock"
LOCK_PATIENCE = 5.0
"""Seconds to wait for a run that is just ending."""


@contextmanager
def claim(directory: Path) -> Iterator[None]:
    """Keep other runs out of a directory, which is made if absent.

    The claim ends with the process, however that ends. Of several processes the main one has it.

    Raises:
        ValueError: the directory cannot be written, or another run is in there and does not end
            within a few seconds.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / LOCK).open("a")
    with file:
        _take(file, directory)
        yield


def _take(file: IO[str], directory: Path) -> None:
    if fcntl is None:
        return
    until = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > until:
                raise ValueError(
                    f"output_dir must not be in use by another run, and {directory} is; wait for "
                    "it, stop it, or choose another output_dir."
                ) from error
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return
        else:
            return


def set_aside(directory: Path, names: Iterable[str], say: Callable[[str], object]) -> None:
    """Move those of some files and folders that are there into one called earlier-N, and say so."""
    found = [name for name in names if (directory / name).exists()]
    if not found:
        return
    number = next(n for n in itertools.count(1) if not (directory / f"earlier-{n}").exists())
    place = directory / f"earlier-{number}"
    place.mkdir()
    for name in found:
        (directory / name).rename(place / name)
    say(f"What was in {directory} before is now in {place}: {', '.join(found)}.")
