"""Files that are there whole: written aside, and moved into place once they are on the disk."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ABANDONED = 3600.0
"""Seconds without a change after which nothing is writing a file any more."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what takes the place of a file, unless something fails meanwhile.

    Raises:
        OSError: the disk is full, say; it names the file, which is as it was.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield aside
        sync(aside)
        aside.replace(path)
    except OSError as error:
        if error.filename not in (None, str(aside)):
            raise
        # of a write, which does not know where it goes
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> None:
    """Remove what processes that were killed had begun to write in a folder that others share."""
    for left in folder.glob(".*.partial"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
