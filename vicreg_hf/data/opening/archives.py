"""Local archives, looked at before `datasets` unpacks them: what is in one may not be harmless."""

from __future__ import annotations

import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from datasets import config

from vicreg_hf.data.columns.reading import MAX_FILE

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
"""Endings of what `datasets` would decompress within a tar, in memory."""


def check_archives(path: Path) -> None:
    """Look at the headers of an archive, or of those in a folder.

    Nothing is unpacked; a second for some 50,000 files within.

    Raises:
        ValueError: damaged or cut off; files that are too large to be images or compressed once
            more, or more than the disk holds.
    """
    inside = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    for archive in [path] if path.is_file() else inside:
        try:
            if archive.suffix == ".zip":
                _check_sizes(archive, _files_of_zip(archive))
            elif archive.suffix == ".tar":
                _check_sizes(archive, _files_of_tar(archive))
        except (OSError, tarfile.TarError, zipfile.BadZipFile):  # `datasets` will say so
            continue


def _files_of_zip(archive: Path) -> Iterator[tuple[str, int]]:
    with zipfile.ZipFile(archive) as file:
        total = 0
        for entry in file.infolist():
            total += entry.file_size
            yield entry.filename, entry.file_size
    place = Path(config.HF_DATASETS_CACHE)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if total > free:
        raise ValueError(
            f"an archive must fit on the disk, got {archive}, which says it holds {total} bytes, "
            f"and {place} has {free} free."
        )


def _files_of_tar(archive: Path) -> Iterator[tuple[str, int]]:
    with tarfile.open(archive, "r:") as file:  # fails where it is compressed as a whole
        for entry in _entries(file, archive):
            file.members = []  # pyright: ignore - tarfile remembers every one
            if entry.name.lower().endswith(COMPRESSED):
                raise ValueError(
                    f"a tar must hold files that are not compressed once more, got {entry.name} in "
                    f"{archive}; decompress them first."
                )
            yield entry.name, entry.size


def _entries(file: tarfile.TarFile, archive: Path) -> Iterator[tarfile.TarInfo]:
    try:
        yield from file
    except tarfile.TarError as error:
        raise ValueError(
            f"an archive must be whole, and {archive} is not: {error}; get it once more."
        ) from error


def _check_sizes(archive: Path, files: Iterator[tuple[str, int]]) -> None:
    for name, size in files:
        if size > MAX_FILE:
            raise ValueError(
                f"files in an archive must have at most {MAX_FILE} bytes, got {name} with {size} "
                f"in {archive}; leave it out."
            )
