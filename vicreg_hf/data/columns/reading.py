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
from vicreg_hf.runtime.files import native_path

MAX_FILE = 2**30
"""Bytes of an image file, more than any image of `MAX_PIXELS` needs; a larger one is not read."""
ZIP = "zip://"
HUB = "hf://"
BASE64 = re.compile(r"(data:[^,]*,)?[A-Za-z0-9+/_\s-]{64,}=*")
IN_ZIP = "::"
"""Stands between a file in a zip and that zip: zip://oak/001.jpg::pictures.zip."""
UTF8_NAME = 0x800
"""The flag of a file in a zip whose name is in UTF-8, and not in code page 437."""


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
        # another process has another position in the file
        file, entries = _open_zip(native_path(archive), os.getpid())
        entry = entries.get(name) or file.getinfo(name)
        _check_size(entry.file_size, most)
        return file.read(entry)
    if (archive or path).startswith(HUB):
        with xopen(path, "rb") as file:
            content = file.read(most + 1)
        _check_size(len(content), most)
        return content
    place = Path(native_path(path))
    if place.exists() and not place.is_file():  # a pipe would be waited for
        raise ValueError("it is no regular file.")
    _check_size(place.stat().st_size, most)
    return place.read_bytes()


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


def files_in_zip(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The files in a zip, by their names with / between folders.

    Some programs for Windows write a backslash there, and some for macOS UTF-8 without saying so.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        name = entry.filename
        if not entry.flag_bits & UTF8_NAME:
            with suppress(UnicodeError):
                name = name.encode("cp437").decode()
        name = name.replace("\\", "/")
        other = found.get(name, entry).filename != entry.filename
        if not name.endswith("/"):
            found[entry.filename if other else name] = entry
    return found


@lru_cache(maxsize=8)
def _open_zip(archive: str, _process: int) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    file = zipfile.ZipFile(archive)
    return file, files_in_zip(file)


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"it has {size} bytes, more than the {most} allowed.")
