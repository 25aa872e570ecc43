"""Folders and zips of images or sounds: which file is in which split, and of which class.

`datasets` guesses the splits from names of files and folders at any depth, and leaves out, without
a word, what then belongs to none.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder

from vicreg_hf.data.columns.finding import LABEL
from vicreg_hf.data.columns.image_files import HEIF_SUFFIXES, SUFFIXES
from vicreg_hf.data.columns.reading import IN_ZIP, ZIP

SPLIT_OF = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}


class Kind(NamedTuple):
    """Of the files that a data set is made of."""

    plural: str
    column: str
    """Its name in tables, as `datasets` calls it."""
    feature: Any
    suffixes: frozenset[str]

    def has(self, name: str) -> bool:
        """Whether a file is of it, by its ending."""
        return os.path.splitext(name)[1].lower() in self.suffixes


IMAGES = Kind("images", "image", datasets.Image(), SUFFIXES | HEIF_SUFFIXES)
SOUNDS = Kind("sounds", "audio", datasets.Audio(), frozenset(AudioFolder.EXTENSIONS))


class MediaFile(NamedTuple):
    """A file of a data set, in a folder or in a zip."""

    parts: tuple[str, ...]
    """Folders between the data set and the file."""
    path: str
    """The file, as `read_file` takes it."""


class Rows(NamedTuple):
    """What a table holds of some files, one row each."""

    table: pa.Table
    features: dict[str, Any]


def list_files(folder: Path) -> Iterator[tuple[str, str]]:
    """Files at any depth: each one's folder within this one, and its name.

    Like `datasets`, without what is hidden or called __something, and through links.
    """
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link back to where it stands
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(each for each in folders if not each.startswith((".", "__")))
        within = os.path.relpath(place, folder)
        yield from (
            ("" if within == "." else within, name) for name in names if not name.startswith(".")
        )


def files_of_folder(
    folder: Path,
    belongs: Callable[[str], bool],
    *,
    say: Callable[[str], object] = lambda _: None,
) -> list[MediaFile]:
    """Files in a folder, at any depth; or in its zips, if they are all there is.

    Args:
        belongs: which, by their names.
        say: told of zips that are not read.

    Raises:
        ValueError: a damaged zip.
    """
    root = os.path.abspath(folder)
    found: list[MediaFile] = []
    zips: list[Path] = []
    for within, name in list_files(folder):
        if belongs(name):
            found.append(MediaFile(Path(within).parts, os.path.join(root, within, name)))
        elif name.lower().endswith(".zip"):
            zips.append(Path(root, within, name))
    zips.sort()
    if found and zips:
        say(
            f"{len(zips)} zips in {folder} are not read, as there are other files beside them: "
            f"{zips[0]} is the first; unpack them, if these are not what was in them."
        )
    if found:
        return sorted(found, key=lambda file: file.path)
    for archive in zips:
        above = (*archive.relative_to(root).parent.parts, archive.stem)
        inside = files_of_zip(archive, belongs)
        found += [MediaFile((*above, *parts), path) for parts, path in inside]
    return found


def files_of_zip(archive: Path, belongs: Callable[[str], bool]) -> list[MediaFile]:
    """Files in a zip, which stays as it is.

    Args:
        belongs: which, by their names.

    Raises:
        ValueError: it is damaged, or none.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            names = opened.namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"an archive must be whole, and {archive} is not: {error}; get it once more."
        ) from error
    found: list[MediaFile] = []
    for name in names:
        parts = PurePosixPath(name).parts
        hidden = any(part.startswith((".", "__")) for part in parts)
        if parts and belongs(parts[-1]) and not hidden:
            found.append(MediaFile(parts[:-1], f"{ZIP}{name}{IN_ZIP}{archive.absolute()}"))
    return sorted(found, key=lambda file: file.path)


def split_named(name: str) -> str | None:
    """The split that a folder is called after, such as train2017 or Test set; None of two or none.

    The words are those of `datasets`.
    """
    words = re.split(f"[{NON_WORDS_CHARS}]+", name.lower())
    named = {SPLIT_OF[word] for word in words if word in SPLIT_OF}
    return named.pop() if len(named) == 1 else None


def _splits_of(
    files: Sequence[MediaFile], kind: Kind, say: Callable[[str], object]
) -> dict[str, dict[int, tuple[str, ...]]]:
    """Divide files into splits.

    By the outermost folder that is called after a split; but all of them are `train` unless each is
    below such a folder, or some are for training and others to measure on. So a class may be called
    train.

    Returns:
        The numbers of the files of each split, and the folders each is in but for the split's own.
    """
    known = {parts: _split_in(parts) for parts in {file.parts for file in files}}
    names = {split for split, _ in known.values() if split is not None}
    complete = all(split is not None for split, _ in known.values())
    if not names or not (complete or ("train" in names and len(names) > 1)):
        return {"train": {number: file.parts for number, file in enumerate(files)}}
    splits: dict[str, dict[int, tuple[str, ...]]] = defaultdict(dict)
    outside: list[MediaFile] = []
    for number, file in enumerate(files):
        split, rest = known[file.parts]
        if split is None:
            outside.append(file)
        else:
            splits[split][number] = rest
    if outside:
        say(
            f"{len(outside)} {kind.plural} are in no split, as they are below no folder that is "
            f"called after one, and are left out: {outside[0].path} is the first; move them into a "
            "folder called train, or name theirs alone."
        )
    return {name: splits[name] for name in map(str, SPLIT_KEYWORDS) if name in splits}


def _split_in(parts: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """The split that these folders belong to, and what is left without its own folder."""
    for place, name in enumerate(parts):
        if (split := split_named(name)) is not None:
            return split, parts[:place] + parts[place + 1 :]
    return None, parts


def tables_of(
    files: Sequence[MediaFile],
    kind: Kind,
    *,
    rows: Rows | None = None,
    say: Callable[[str], object],
) -> dict[str, datasets.Dataset]:
    """Tables of the splits of files that stay where they are, with their classes if they have any.

    A class is the folder that a file lies in, where all of a split lie equally deep below the
    split's own, and there are several in all.

    Args:
        rows: what the tables hold of each file; by default the file alone.
        say: told of files that are in no split.
    """
    if rows is None:
        cells = cells_of([file.path for file in files])
        rows = Rows(pa.table({kind.column: cells}), {kind.column: kind.feature})
    splits = _splits_of(files, kind, say)
    named = {
        name: [parts[-1] for parts in places.values()]
        for name, places in splits.items()
        if len({len(parts) for parts in places.values()}) == 1 and all(places.values())
    }
    classes = sorted(set().union(*named.values()))
    if len(classes) < 2 or LABEL in rows.features:
        named = {}
    numbers = {name: number for number, name in enumerate(classes)}
    tables: dict[str, datasets.Dataset] = {}
    for name, places in splits.items():
        table, features = rows.table.take(list(places)), datasets.Features(rows.features)
        if name in named:
            column = pa.array([numbers[each] for each in named[name]], pa.int64())
            table = table.append_column(LABEL, column)
            features[LABEL] = datasets.ClassLabel(names=classes)
        table = table.cast(features.arrow_schema)
        tables[name] = datasets.Dataset(table, info=datasets.DatasetInfo(features=features))
    return tables


def cells_of(paths: Sequence[str | None]) -> pa.StructArray:
    """Files as a column of images or sounds holds them.

    Raises:
        ValueError: names that are not UTF-8, as all text in tables is.
    """
    strange = sorted(os.fsencode(path) for path in paths if path is not None and not _is_utf8(path))
    if strange:
        raise ValueError(
            f"names of files and of their folders must be UTF-8, and {len(strange)} of "
            f"{len(paths)} are not: {strange[0]!r} is the first; rename them, as convmv does."
        )
    column = pa.array(paths, pa.string())
    return pa.StructArray.from_arrays(
        [pa.nulls(len(column), pa.binary()), column], ["bytes", "path"], mask=column.is_null()
    )


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
