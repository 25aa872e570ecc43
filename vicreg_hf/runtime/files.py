"""Writing files so that each is whole or not there, and saying which one has no room."""

from __future__ import annotations

import codecs
import errno
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a disk, a quota or a file that takes no more."""
ABANDONED = 3600.0
"""Seconds without a change after which nothing is writing a file any more."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; what is written there then replaces a file, unless something fails.

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
        # a failed write does not name its file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> None:
    """Remove files that killed processes had begun to write in a folder that others share."""
    for left in folder.glob(".*.partial"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()


@contextmanager
def writing(directory: Path, setting: str = "output_dir", *, remedy: str = "") -> Iterator[None]:
    """Blame a setting when a file in the directory that it names cannot be written.

    Args:
        remedy: a sentence on what is lost and what to do.

    Raises:
        ValueError: instead of an OSError about the directory, or about a file in it.
    """
    try:
        yield
    except OSError as error:
        if not _concerns(error, directory):
            raise
        sentence = f"{setting} must be a directory that can be written, got {directory}: {error}."
        raise ValueError(f"{sentence} {remedy}".rstrip()) from error


def _concerns(error: OSError, directory: Path) -> bool:
    """Whether an error is about a directory, a file in it, or a folder around it."""
    if not isinstance(error.filename, (str, os.PathLike)):
        return False
    file, place = Path(error.filename).absolute(), directory.absolute()
    return file.is_relative_to(place) or place.is_relative_to(file)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for the duration of a block.

    Raises:
        OSError: there is no room for the files that are written to it.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield Path(folder)
        except (OSError, SafetensorError) as error:
            if not _has_no_room(error):
                raise
            raise OSError(
                f"the temporary folder {tempfile.gettempdir()} must have room for an "
                f"encoder, and has not: {error}; free some space there, or set TMPDIR to another."
            ) from error


def _has_no_room(error: OSError | SafetensorError) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    found = re.search(r"os error (\d+)", str(error))
    return found is not None and int(found[1]) in FULL


def local_path(name: str) -> str | None:
    """The absolute path of a name, where something of that name is on this machine."""
    path = os.path.abspath(os.path.expanduser(name))
    return path if name and os.path.exists(path) else None


def utf8_path(path: str) -> str:
    """A path in UTF-8, as tables hold it, whatever encoding the locale names."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def native_path(path: str) -> str:
    """A path that `utf8_path` gave, or a table, as the functions of `os` take it."""
    return os.fsdecode(path.encode("utf-8", "surrogateescape"))


def decode_text(content: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 as Windows writes it, with or without its mark.

    Raises:
        UnicodeError: the file is in another encoding, or in UTF-16 without a byte order mark.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    if b"\0" in content:
        raise UnicodeError("it holds zero bytes, as UTF-16 without a byte order mark does")
    return content.decode("utf-8-sig")


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
