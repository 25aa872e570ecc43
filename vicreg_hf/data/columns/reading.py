"""The files that cells hold or name: on the disk, in a zip, or on the Hub."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from datasets.utils.file_utils import xopen

from vicreg_hf.data.columns.base import Column
from vicreg_hf.data.columns.image_files import ImageError

MAX_FILE = 2**30
"""Bytes of an image file, more than any image of `MAX_PIXELS` needs; a larger one is not read."""
ZIP = "zip://"
HUB = "hf://"
BASE64 = re.compile(r"(data:[^,]*,)?[A-Za-z0-9+/_\s-]{64,}=*")
IN_ZIP = "::"
"""Stands between a file in a zip and that zip: zip://oak/001.jpg::pictures.zip."""


class FileColumn(Column):
    """A column whose cells hold files as bytes, or name them."""

    max_bytes: ClassVar[int] = MAX_FILE
    """Bytes that a named file may have."""

    def encoded(self, cell: Any) -> bytes:
        """The bytes of a cell's file, which identify it; none where the cell is empty.

        A cell is what `datasets` casts to an image: bytes, a path, or a dict of either or both.
        Paths are relative to where the program runs.

        Raises:
            ImageError: the file cannot be read.
        """
        if isinstance(cell, bytes):
            return cell
        path = cell
        if isinstance(cell, dict):
            if (stored := cell.get("bytes")) is not None:
                return stored
            path = cell.get("path")
        if path is None:
            return b""
        try:
            return read_file(path, self.max_bytes)
        except Exception as error:  # zips raise whatever their parsing meets
            if BASE64.fullmatch(path):
                raise ImageError(
                    "the text is no path, but looks like base64; decode it first, with "
                    f'dataset.map(lambda row: {{"{self.name}": base64.b64decode(row["{self.name}"]'
                    ")}), and save_to_disk."
                ) from None
            raise ImageError(f"the file cannot be read: {error}") from error

    def digest(self, cells: Iterable[Any]) -> str:
        """A checksum of the files of some cells, by which a data set is known again."""
        digest = hashlib.sha256()
        for cell in cells:
            with suppress(ImageError):  # one that cannot be read
                digest.update(self.encoded(cell))
        return digest.hexdigest()


def read_file(path: str, most: int = MAX_FILE) -> bytes:
    """All of a file.

    Args:
        path: local, or as `datasets` writes it: zip://FILE::ZIP, or on the Hub, hf://….
        most: bytes it may have.

    Raises:
        ValueError: it has more.
        Exception: anything that keeps it from being read, such as a damaged or encrypted zip.
    """
    archive, name = zip_and_name(path)
    if archive is not None and "://" not in archive:
        file = _open_zip(archive, os.getpid())  # another process has another position in the file
        _check_size(file.getinfo(name).file_size, most)
        return file.read(name)
    if (archive or path).startswith(HUB):
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


@lru_cache(maxsize=8)
def _open_zip(archive: str, _process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(archive)


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"it has {size} bytes, more than the {most} allowed.")
