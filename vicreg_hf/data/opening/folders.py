"""Folders and zips of images or sounds: the split and the class of every file.

`datasets` guesses the splits from names of files and folders at any depth, and leaves out, without
a word, what then belongs to none.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
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
from vicreg_hf.data.columns.reading import zip_and_name
from vicreg_hf.data.opening.listing import count_left_out, suffix_of

SPLIT_OF = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}

MAX_STRAYS = 0.25
"""The share of files that may lie at another depth than their classes; a single one always may."""


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

    A class is the folder that a file lies in, where most of a split lie equally deep below the
    split's own, and there are several in all. The few that lie at another depth have no class.

    Args:
        place: the folder or zip that holds the files.
        files: paths of N files, which stay where they are.
        rows: N rows, in which files are given by their paths.
        features: what the columns of `rows` hold.
        warn: called with a sentence on files that are in no split or have no class.

    Raises:
        ValueError: a path that is not UTF-8, as all text in tables is.
    """
    splits = _divide_into_splits(place, files, warn)
    named = _with_one_spelling({
        split: names for split, within in splits.items() if (names := _classes(within))
    })  # fmt: skip
    classes = sorted({name for names in named.values() for name in names if name})
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(classes)}
    tables = {}
    for split, within in splits.items():
        table, kinds = rows.take(list(within)), datasets.Features(features)
        if split in named and len(classes) > 1 and LABEL not in features:
            column = pa.array([numbers.get(name) for name in named[split]], pa.int64())
            if strays := [row for row, name in zip(within, named[split], strict=True) if not name]:
                warn(
                    f"{len(strays)} of {len(within)} files in split {split} have no label, as they "
                    f"lie at another depth than the others: {files[strays[0]]} is the first; move "
                    "it into the folder of a class, or elsewhere."
                )
            table = table.append_column(LABEL, column)
            kinds[LABEL] = datasets.ClassLabel(names=classes)
        table = table_cast(table, kinds.arrow_schema)
        tables[split] = datasets.Dataset(table, info=datasets.DatasetInfo(features=kinds))
    return tables


def _classes(within: Mapping[int, tuple[str, ...]]) -> list[str | None]:
    """The class of each file of a split, None for the few at another depth; empty for none."""
    ((depth, most),) = Counter(map(len, within.values())).most_common(1)
    others = len(within) - most
    if depth == 0 or others > max(1, most * MAX_STRAYS) or others == most:
        return []
    return [folders[-1] if len(folders) == depth else None for folders in within.values()]


def _with_one_spelling(named: dict[str, list[str | None]]) -> dict[str, list[str | None]]:
    """Give a class one name where splits write it with other capitals, and no split has both."""
    first: dict[str, str] = {}
    apart: set[str] = set()
    for names in named.values():
        spellings = sorted(set(filter(None, names)))
        folded = Counter(map(str.casefold, spellings))
        apart |= {name for name, count in folded.items() if count > 1}
        for name in spellings:
            first.setdefault(name.casefold(), name)
    return {
        split: [first[n.casefold()] if n and n.casefold() not in apart else n for n in names]
        for split, names in named.items()
    }


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
    to measure on, or those below such folders lie in the same folders as the rest, which then are
    `train`. So a class may be called train.

    Returns:
        The numbers of each split's files, with the folders of each but for the split's own.
    """
    folders = [_folders_of(file, place) for file in files]
    known = {each: _take_split(each) for each in set(folders)}
    names = {split for split, _ in known.values()}
    if None in names and not ("train" in names and len(names) > 2):
        outer = {each for each in folders if known[each][0] is None}
        inner = {within for split, within in known.values() if split is not None}
        if "train" in names or not inner or not inner <= outer or () in inner:
            if named := sorted(map(str, names - {None, "train"})):
                warn(
                    f"folders in {place} that are called after the splits {', '.join(named)} are "
                    "taken for classes, as not all images are below such folders; move the others "
                    "into a folder called train."
                )
            return {"train": dict(enumerate(folders))}
        known |= {each: ("train", each) for each in outer}
    splits: dict[str | None, dict[int, tuple[str, ...]]] = defaultdict(dict)
    for number, each in enumerate(folders):
        split, within = known[each]
        splits[split][number] = within
    if outside := splits[None]:
        count_left_out(len(outside), "they are in no split")
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
    within = os.path.dirname(path.removeprefix(place).replace("\\", "/")).lstrip("/")
    return PurePath(unicodedata.normalize("NFC", within)).parts  # macOS writes accents apart


def _take_split(folders: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """The split that a file in these folders belongs to, and the folders but for the split's."""
    for place, name in enumerate(folders):
        if (split := split_of_folder(name)) is not None:
            return split, folders[:place] + folders[place + 1 :]
    return None, folders
