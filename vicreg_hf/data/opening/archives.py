"""Checks of local archives before `datasets` unpacks them, as they may hold bombs."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from datasets import config

from vicreg_hf.data.columns.reading import MAX_FILE
from vicreg_hf.runtime.console import warn

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
"""Endings of files in a tar that `datasets` would decompress in memory."""


def check_archives(path: Path) -> None:
    """Look at the headers of an archive, or of those in a folder.

    Nothing is unpacked; this takes a second for some 50,000 files in archives.

    Raises:
        ValueError: one that is cut off; files that are too large to be images or compressed once
            more, or more than the disk holds.
    """
    sizes = {".zip": _sizes_in_zip, ".tar": _sizes_in_tar}
    for archive in [path] if path.is_file() else path.rglob("*"):
        if (suffix := archive.suffix.lower()) not in sizes:
            continue
        try:
            for name, size in sizes[suffix](archive):
                if size > MAX_FILE:
                    raise ValueError(
                        f"files in an archive must have at most {MAX_FILE} bytes, got {name} with "
                        f"{size} in {archive}; leave it out."
                    )
        except (OSError, tarfile.TarError, zipfile.BadZipFile):  # `datasets` will say so
            continue


def _sizes_in_zip(archive: Path) -> list[tuple[str, int]]:
    with zipfile.ZipFile(archive) as file:
        sizes = [(entry.filename, entry.file_size) for entry in file.infolist()]
    cache = Path(config.HF_DATASETS_CACHE)
    free = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists())).free
    if (total := sum(size for _, size in sizes)) > free:
        raise ValueError(
            f"an archive must fit on the disk, got {archive}, which says it holds {total} bytes, "
            f"and {cache} has {free} free."
        )
    return sizes


def _sizes_in_tar(archive: Path) -> Iterator[tuple[str, int]]:
    with tarfile.open(archive, "r:") as file:  # fails where it is compressed as a whole
        try:
            for entry in file:
                file.members = []  # pyright: ignore - tarfile remembers every one
                if entry.name.lower().endswith(COMPRESSED):
                    raise ValueError(
                        "a tar must hold files that are not compressed once more, got "
                        f"{entry.name} in {archive}; decompress them first."
                    )
                yield entry.name, entry.size
            if archive.stat().st_size - file.offset < tarfile.BLOCKSIZE:  # its mark is as large
                warn(f"{archive} has no end mark, and may be cut off; count what is in it.")
        except tarfile.TarError as error:
            raise ValueError(
                f"an archive must be whole, and {archive} is not: {error}; get it once more."
            ) from error
