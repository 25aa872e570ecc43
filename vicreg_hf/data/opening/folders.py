"""Folders and zips of images or sounds: the split and the class of every file.

`datasets` guesses the splits from names of files and folders at any depth, and leaves out, without
a word, what then belongs to none.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
from datasets.table import table_cast

from vicreg_hf.data.columns.finding import LABEL
from vicreg_hf.data.columns.image_files import HEIF_SUFFIXES, SUFFIXES
from vicreg_hf.data.columns.reading import IN_ZIP, ZIP, zip_and_name

SPLIT_OF = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}


class Media(NamedTuple):
    """The sort of files that a data set is made of."""

    plural: str
    column: str
    """The name that `datasets` gives to their column."""
    feature: Any
    suffixes: frozenset[str]

    def has(self, path: str) -> bool:
        """Whether a file is of this sort, by its ending."""
        return suffix_of(path) in self.suffixes


IMAGES = Media("images", "image", datasets.Image(), SUFFIXES | HEIF_SUFFIXES)
SOUNDS = Media("sounds", "audio", datasets.Audio(), frozenset(AudioFolder.EXTENSIONS))


def suffix_of(path: str) -> str:
    """The ending of a file, which may lie in a zip, in small letters."""
    return os.path.splitext(zip_and_name(path)[1])[1].lower()


def list_folder(folder: str) -> list[str]:
    """List the files at any depth, sorted.

    Like `datasets`, leaves out what is hidden or called __something, and follows links.
    """
    found: list[str] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link back to where it stands
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        found += [os.path.join(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def list_zip(archive: str) -> list[str]:
    """List the files in a zip, which stays as it is, sorted; leaves out what `list_folder` does.

    Raises:
        ValueError: it is damaged, or no zip.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            names = opened.namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"an archive must be whole, and {archive} is not: {error}; get it once more."
        ) from error
    hidden = re.compile(r"(^|/)(\.|__)|/$")
    return sorted(f"{ZIP}{name}{IN_ZIP}{archive}" for name in names if not hidden.search(name))


def split_of_folder(name: str) -> str | None:
    """The split that a folder is called after, such as train2017 or Test set.

    The words are those of `datasets`. None where the name has words of no split, or of two.
    """
    words = re.split(f"[{NON_WORDS_CHARS}]+", name.lower())
    named = {SPLIT_OF[word] for word in words if word in SPLIT_OF}
    return named.pop() if len(named) == 1 else None


def tables_of_splits(
    place: str,
    files: Sequence[str],
    rows: pa.Table,
    features: Mapping[str, Any],
    *,
    warn: Callable[[str], object],
) -> dict[str, datasets.Dataset]:
    """Divide the rows of files into splits, with their classes if they have any.

    A class is the folder that a file lies in, where all of a split lie equally deep below the
    split's own, and there are several in all.

    Args:
        place: the folder or zip that holds the files.
        files: paths of N files, which stay where they are.
        rows: N rows, in which files are given by their paths.
        features: what the columns of `rows` hold.
        warn: called with a sentence on files that are in no split.

    Raises:
        ValueError: a path that is not UTF-8, as all text in tables is.
    """
    splits = _divide_into_splits(place, files, warn)
    named = {
        split: [folders[-1] for folders in within.values()]
        for split, within in splits.items()
        if len(set(map(len, within.values()))) == 1 and () not in within.values()
    }
    classes = sorted(set().union(*named.values()))
    numbers = {name: number for number, name in enumerate(classes)}
    tables = {}
    for split, within in splits.items():
        table, kinds = rows.take(list(within)), datasets.Features(features)
        if split in named and len(classes) > 1 and LABEL not in features:
            column = pa.array([numbers[name] for name in named[split]], pa.int64())
            table = table.append_column(LABEL, column)
            kinds[LABEL] = datasets.ClassLabel(names=classes)
        table = table_cast(table, kinds.arrow_schema)
        tables[split] = datasets.Dataset(table, info=datasets.DatasetInfo(features=kinds))
    return tables


def column_of_paths(paths: Sequence[Any]) -> pa.Array:
    """A column of paths, or of lists of them, which `table_cast` turns into one of files.

    Raises:
        ValueError: a path that is not UTF-8, as all text in tables is.
    """
    try:
        return pa.array(paths)
    except UnicodeEncodeError as error:
        raise ValueError(
            "names of files and of their folders must be UTF-8, got "
            f"{os.fsencode(error.object)!r}; rename them, as convmv does."
        ) from None


def _divide_into_splits(
    place: str, files: Sequence[str], warn: Callable[[str], object]
) -> dict[str, dict[int, tuple[str, ...]]]:
    """Divide files by the outermost folder that is called after a split.

    All of them are `train` unless each is below such a folder, or some are for training and others
    to measure on. So a class may be called train.

    Returns:
        The numbers of each split's files, with the folders of each but for the split's own.
    """
    folders = [_folders_of(file, place) for file in files]
    known = {each: _take_split(each) for each in set(folders)}
    names = {split for split, _ in known.values()}
    if None in names and not ("train" in names and len(names) > 2):
        return {"train": dict(enumerate(folders))}
    splits: dict[str | None, dict[int, tuple[str, ...]]] = defaultdict(dict)
    for number, each in enumerate(folders):
        split, within = known[each]
        splits[split][number] = within
    if outside := splits[None]:
        warn(
            f"{len(outside)} files are in no split, as they are below no folder that is called "
            f"after one, and are left out: {files[min(outside)]} is the first; move them into a "
            "folder called train, or name theirs alone."
        )
    return {name: splits[name] for name in map(str, SPLIT_KEYWORDS) if name in splits}


def _folders_of(file: str, place: str) -> tuple[str, ...]:
    """The folders from a folder or zip down to a file; a zip within counts as a folder."""
    archive, path = zip_and_name(file)
    if archive is not None:
        path = os.path.join(place if archive == place else os.path.splitext(archive)[0], path)
    return PurePath(os.path.dirname(path).removeprefix(place).lstrip(os.sep)).parts


def _take_split(folders: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """The split that a file in these folders belongs to, and the folders but for the split's."""
    for place, name in enumerate(folders):
        if (split := split_of_folder(name)) is not None:
            return split, folders[:place] + folders[place + 1 :]
    return None, folders
