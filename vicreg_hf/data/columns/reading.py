"""The content of a file: on the disk, in a zip, or where `datasets` reads a stream from."""

from __future__ import annotations

import os
import zipfile
from functools import lru_cache
from pathlib import Path, PurePosixPath

from datasets.utils.file_utils import xopen

MAX_FILE = 2**30
"""Bytes of an image file, more than any image of `MAX_PIXELS` needs; a larger one is not read."""
ZIP = "zip://"
HUB = "hf://"
IN_ZIP = "::"
"""Stands between a file in a zip and that zip: zip://oak/001.jpg::pictures.zip."""


def read_file(path: str, most: int = MAX_FILE) -> bytes:
    """All of a file.

    Args:
        path: local, or as `datasets` writes it: zip://FILE::ZIP, or on the Hub, hf://….
        most: bytes it may have.

    Raises:
        ValueError: it has more.
        Exception: whatever keeps it from being read, such as a damaged or encrypted zip.
    """
    name, _, archive = path.removeprefix(ZIP).rpartition(IN_ZIP)
    if path.startswith(ZIP) and "://" not in archive:
        return _read_from_zip(name, archive, most)
    if (archive or path).startswith(HUB):  # of other addresses in a data set nobody has heard
        with xopen(path, "rb") as file:
            content = file.read(most + 1)
        _check_size(len(content), most)
        return content
    _check_size(Path(path).stat().st_size, most)
    return Path(path).read_bytes()


def zip_and_name(path: str) -> tuple[str | None, str]:
    """The zip that a file is in, or None, and its name there, or else its path."""
    if not path.startswith(ZIP):
        return None, path
    name, _, archive = path.removeprefix(ZIP).rpartition(IN_ZIP)
    return archive, name


def beside(path: str, name: str) -> str:
    """A file by its path from the folder of another, on the disk or in the same zip."""
    archive, within = zip_and_name(path)
    if archive is None:
        return os.path.join(os.path.dirname(path), name)
    return f"{ZIP}{PurePosixPath(within).parent / name}{IN_ZIP}{archive}"


def _read_from_zip(name: str, archive: str, most: int) -> bytes:
    file = _opened(archive, os.getpid())  # a process of its own has a position of its own
    _check_size(file.getinfo(name).file_size, most)
    return file.read(name)


@lru_cache(maxsize=8)
def _opened(archive: str, _process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(archive)


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"it has {size} bytes, more than the {most} allowed.")
