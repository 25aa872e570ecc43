"""Folders and zips of images or sounds: which file is in which split, and of which class.

`datasets` guesses the splits from names of files and folders at any depth, and leaves out, without
a word, what then belongs to none.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder

from vicreg_hf.images import HEIF_SUFFIXES, SUFFIXES
from vicreg_hf.reading import IN_ZIP, ZIP

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Files in which `datasets` looks for what belongs to the images."""
SPLIT_OF = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}


class Kind(NamedTuple):
    """Of the files that a data set is made of."""

    plural: str
    column: str
    """Its name in tables, as `datasets` calls it."""
    feature: Any
    suffixes: frozenset[str]


IMAGES = Kind("images", "image", datasets.Image(), SUFFIXES | HEIF_SUFFIXES)
SOUNDS = Kind("sounds", "audio", datasets.Audio(), frozenset(AudioFolder.EXTENSIONS))


class MediaFile(NamedTuple):
    """A file of a data set, in a folder or in a zip."""

    parts: tuple[str, ...]
    """Folders between the data set and the file."""
    path: str
    """The file, as `read_file` takes it."""


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


def is_of(kind: Kind, name: str) -> bool:
    """By its ending."""
    return os.path.splitext(name)[1].lower() in kind.suffixes


def files_of_folder(
    folder: Path, kind: Kind, *, say: Callable[[str], object] = lambda _: None
) -> list[MediaFile]:
    """The files of a kind in a folder, at any depth; or in its zips, if they are all there is.

    Args:
        say: told of zips that are not read.

    Raises:
        ValueError: a damaged zip.
    """
    root = os.path.abspath(folder)
    found: list[MediaFile] = []
    zips: list[Path] = []
    for within, name in list_files(folder):
        if is_of(kind, name):
            found.append(MediaFile(Path(within).parts, os.path.join(root, within, name)))
        elif name.lower().endswith(".zip"):
            zips.append(Path(root, within, name))
    zips.sort()
    if found and zips:
        say(
            f"{len(zips)} zips in {folder} are not read, as there are {kind.plural} beside them: "
            f"{zips[0]} is the first; unpack them, if these are not what was in them."
        )
    if found:
        return sorted(found, key=lambda file: file.path)
    for archive in zips:
        above = (*archive.relative_to(root).parent.parts, archive.stem)
        inside = files_of_zip(archive, kind)
        found += [MediaFile((*above, *parts), path) for parts, path in inside]
    return found


def files_of_zip(archive: Path, kind: Kind) -> list[MediaFile]:
    """The files of a kind in a zip, which stays as it is.

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
        if is_of(kind, name) and not hidden:
            found.append(MediaFile(parts[:-1], f"{ZIP}{name}{IN_ZIP}{archive.absolute()}"))
    return sorted(found, key=lambda file: file.path)


def split_named(name: str) -> str | None:
    """The split that a folder is called after, such as train2017 or Test set; None of two or none.

    The words are those of `datasets`.
    """
    words = re.split(f"[{NON_WORDS_CHARS}]+", name.lower())
    named = {SPLIT_OF[word] for word in words if word in SPLIT_OF}
    return named.pop() if len(named) == 1 else None


def splits_of(
    files: Sequence[MediaFile], kind: Kind, *, say: Callable[[str], object]
) -> dict[str, list[MediaFile]]:
    """Divide files into splits.

    By the outermost folder that is called after a split; but all of them are `train` unless each is
    below such a folder, or some are for training and others to measure on. So a class may be called
    train.

    Args:
        say: told of files that are in no split.

    Returns:
        The files of each split, without the split's folder among their parts.
    """
    known = {parts: _split_in(parts) for parts in {file.parts for file in files}}
    names = {split for split, _ in known.values() if split is not None}
    complete = all(split is not None for split, _ in known.values())
    if not names or not (complete or ("train" in names and len(names) > 1)):
        return {"train": list(files)}
    splits: dict[str, list[MediaFile]] = defaultdict(list)
    outside: list[MediaFile] = []
    for file in files:
        split, rest = known[file.parts]
        if split is None:
            outside.append(file)
        else:
            splits[split].append(file._replace(parts=rest))
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


def tables_of(splits: dict[str, list[MediaFile]], kind: Kind) -> dict[str, datasets.Dataset]:
    """Tables of files that stay where they are, with their classes if they have any.

    A class is the folder that a file lies in, where all of a split lie equally deep below the
    split's own, and there are several in all.
    """
    named = {
        name: [file.parts[-1] for file in files]
        for name, files in splits.items()
        if len({len(file.parts) for file in files}) == 1 and files[0].parts
    }
    classes = sorted(set().union(*named.values()))
    if len(classes) < 2:
        named = {}
    return {name: _table(files, kind, named.get(name), classes) for name, files in splits.items()}


def _table(
    files: Sequence[MediaFile], kind: Kind, named: list[str] | None, classes: list[str]
) -> datasets.Dataset:
    paths = pa.array([file.path for file in files], pa.string())
    cells = pa.StructArray.from_arrays(
        [pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"]
    )
    columns: dict[str, Any] = {kind.column: cells}
    kinds: dict[str, Any] = {kind.column: kind.feature}
    if named is not None:
        numbers = {name: number for number, name in enumerate(classes)}
        columns["label"] = pa.array([numbers[name] for name in named], pa.int64())
        kinds["label"] = datasets.ClassLabel(names=classes)
    features = datasets.Features(kinds)
    table = pa.table(columns).cast(features.arrow_schema)
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))


def say_what_is_missing(
    folder: Path, loaded: Collection[datasets.Dataset], *, say: Callable[[str], object]
) -> None:
    """Tell of images in a folder that no metadata file lists, and of such files that are not read.

    Args:
        loaded: its splits.
        say: told what is missing.
    """
    listed: set[str] = set()
    for table in loaded:
        for column, kind in table.features.items():
            inner = kind.feature if isinstance(kind, (datasets.List, datasets.LargeList)) else kind
            if isinstance(inner, datasets.Image):
                cells = table.select_columns([column]).with_format("arrow")[:][column]
                listed |= _paths(cells.to_pylist())
    images = files_of_folder(folder, IMAGES)
    missing = [image.path for image in images if image.path not in listed]
    if missing:
        say(
            f"{len(missing)} of {len(images)} images in {folder} are left out, as no "
            f"metadata file lists them: {missing[0]} is the first."
        )
    columns = {column for table in loaded for column in table.features}
    if columns <= {IMAGES.column, SOUNDS.column, "label"}:
        unread = next(f"{w}/{n}".lstrip("/") for w, n in list_files(folder) if n in METADATA)
        say(
            f"{unread} in {folder} is not read: with splits, each has a metadata file of its own, "
            "in its folder."
        )


def _paths(cells: list[Any]) -> set[str]:
    flat = (each for cell in cells for each in (cell if isinstance(cell, list) else [cell]))
    return {os.path.abspath(each["path"]) for each in flat if each and each["path"]}
