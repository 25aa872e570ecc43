"""Where data sets are found: on the Hub, in a folder or in a file."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import config
from datasets.config import HF_DATASETS_CACHE

from vicreg_hf.data.columns.reading import zip_and_name
from vicreg_hf.data.opening.archives import check_archives
from vicreg_hf.data.opening.class_names import restore_class_names
from vicreg_hf.data.opening.demo import load_demo
from vicreg_hf.data.opening.folders import (
    IMAGES,
    SOUNDS,
    MediaFile,
    files_of_folder,
    files_of_zip,
    list_files,
    tables_of,
)
from vicreg_hf.data.opening.metadata import METADATA, ONE, read_metadata
from vicreg_hf.data.opening.slicing import Splits
from vicreg_hf.runtime.files import FULL

DEMO = "demo"
UNNAMED = "unnamed"
"""What recipes for data of one's own have in place of a name."""
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
"""What a single file is opened as, but for zips; folders of such are recognised by `datasets`."""
LISTS = (".csv", ".tsv", ".jsonl")
"""What may belong to the images of a folder, under another name than that of metadata."""
KINDS = (IMAGES, SOUNDS)
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


def open_dataset(name: str, config_name: str | None = None, *, streaming: bool = False) -> Splits:
    """The splits of `demo`, a Hub id, a local folder or file.

    Args:
        config_name: of a Hub data set.
        streaming: open tables that are read as they are needed, and not copied to disk first.

    Raises:
        ValueError: nothing there that `datasets` can load; or what is loaded cannot be cached.
    """
    if name == UNNAMED:
        raise ValueError(
            "dataset_name must be given, since this recipe is for data of your own: a data set on "
            "the Hub, or a local folder or file."
        )
    try:
        loaded = _load(name, config_name, streaming)
    except Exception as e:  # builders raise whatever their parsing meets
        if (fault := _cache_fault(e)) is not None:
            raise ValueError(
                f"the cache of data sets must be writable, got {config.HF_DATASETS_CACHE}: "
                f"{fault}; free some space, or set HF_HOME or HF_DATASETS_CACHE to another folder."
            ) from e
        told = [next(iter(str(x).strip().splitlines()), type(x).__name__)
                for x in (e, e.__cause__) if x is not None]  # fmt: skip
        reason = told[0] if told[-1] in told[0] else " ".join(told)
        raise ValueError(
            f"dataset_name must be {DEMO}, a data set on the Hub, or a local folder or file that "
            f"datasets.load_dataset takes, got {name!r}: {reason}"
        ) from e
    if isinstance(loaded, (datasets.Dataset, datasets.IterableDataset)):
        return {str(loaded.split or "train"): loaded}
    return loaded


def _cache_fault(error: BaseException) -> OSError | None:
    """What kept `datasets` from writing to its cache, if that is what an error comes from."""
    caches = [Path(cache) for cache in (config.HF_CACHE_HOME, config.HF_DATASETS_CACHE)]
    for each in _causes(error):
        if isinstance(each, OSError) and (each.errno in FULL or "disk space" in str(each)):
            return each  # reading takes no room
        if isinstance(each, OSError) and each.errno in NOT_WRITABLE and each.filename is not None:
            place = Path(os.fsdecode(each.filename))
            if any(place.is_relative_to(c) or c.is_relative_to(place) for c in caches):
                return each
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _load(name: str, config_name: str | None, streaming: bool) -> Any:
    path = Path(name)
    if name == DEMO:
        loaded = load_demo()
    elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        loaded = datasets.load_from_disk(name)
    elif _holds_files(path):
        loaded = _tables_of_files(path)
    else:
        return _load_by_datasets(path, name, config_name, streaming)
    if config_name is not None:
        raise ValueError(f"{name} has no configs; leave out dataset_config_name.")
    if not streaming:
        return loaded
    if isinstance(loaded, datasets.Dataset):
        return loaded.to_iterable_dataset(num_shards=_shards(loaded))
    return {k: table.to_iterable_dataset(num_shards=_shards(table)) for k, table in loaded.items()}


def _tables_of_files(place: Path) -> Splits:
    """Of the images in a folder or zip, or of its sounds where there are none."""
    for kind in KINDS:
        if files := _files(place, kind.has, say=_warn):
            break
    else:
        raise ValueError(f"there are neither images nor sounds in {place}.")
    tables = _files(place, _may_be_metadata)
    metadata = [file for file in tables if _name_of(file) in METADATA]
    if tables and not metadata:
        _warn(
            f"{tables[0].path} is not read: what belongs to each of the {kind.plural} must be in a "
            f"file called {METADATA[0]}, with a column {ONE}."
        )
    if metadata and _in_zip(metadata[0]) != _in_zip(files[0]):
        _warn(f"{metadata[0].path} is not read, as the {kind.plural} are not where it is.")
        metadata = []
    if not metadata:
        return tables_of(files, kind, say=_warn)
    listed = read_metadata(metadata, kind)
    missing = [file.path for file in files if file.path not in listed.paths]
    if len(missing) == len(files):
        raise ValueError(
            f"metadata must name files that are there, by their paths from its folder, and "
            f"{metadata[0].path} names none of the {len(files)} {kind.plural} in {place}; it has "
            f"{listed.files[0].path}, and {files[0].path} is there."
        )
    places = [file.path for file in listed.files]
    if (again := len(places) - len(set(places))) > 0:
        twice = next(path for path, times in Counter(places).items() if times > 1)
        _warn(
            f"{again} of {len(places)} rows of metadata name {kind.plural} that others name too, "
            f"as {twice}."
        )
    if missing:
        _warn(
            f"{len(missing)} of {len(files)} {kind.plural} in {place} are left out, as no metadata "
            f"file lists them: {missing[0]} is the first."
        )
    return tables_of(listed.files, kind, rows=listed.rows, say=_warn)


def _may_be_metadata(name: str) -> bool:
    return name in METADATA or Path(name).suffix.lower() in LISTS


def _name_of(file: MediaFile) -> str:
    return os.path.basename(zip_and_name(file.path)[1])


def _in_zip(file: MediaFile) -> bool:
    return zip_and_name(file.path)[0] is not None


def _files(
    place: Path,
    belongs: Callable[[str], bool],
    *,
    say: Callable[[str], object] = lambda _: None,
) -> list[MediaFile]:
    if place.is_dir():
        return files_of_folder(place, belongs, say=say)
    return files_of_zip(place, belongs)


def _load_by_datasets(path: Path, name: str, config_name: str | None, streaming: bool) -> Any:
    if _is_main():
        check_archives(path)
    if path.is_file():
        builder = BUILDERS.get(path.suffix.lower())
        if builder is None:
            raise ValueError(f"a file must end in {', '.join(BUILDERS)} or .zip.")
        return datasets.load_dataset(builder, data_files=name, streaming=streaming)
    own = None
    if path.is_dir() and _lists_files(path):
        own = _own_cache(path)
    elif path.is_dir() and (beside := files_of_folder(path, IMAGES.has)):
        _warn(
            f"{len(beside)} images in {path} are left out, as it holds tables or archives too: "
            f"{beside[0].path} is the first; move one or the other into a folder of its own."
        )
    loaded = datasets.load_dataset(name, config_name, streaming=streaming, cache_dir=own)
    if path.is_dir() and isinstance(loaded, datasets.DatasetDict):
        builder = datasets.load_dataset_builder(name, config_name, cache_dir=own)
        restore_class_names(loaded, builder.config.data_files or {})
    return loaded


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _warn(sentence: str) -> None:
    if _is_main():
        print(f"warning: {sentence}", file=sys.stderr)


def _lists_files(folder: Path) -> bool:
    """Whether its card does."""
    card = folder / "README.md"
    return card.is_file() and "configs:" in card.read_text(errors="replace")


def _own_cache(folder: Path) -> str:
    """A cache for a folder whose card lists its files, as they are now.

    `datasets` would take what it has cached of any folder of that name with such a card.
    """
    files = sorted(
        (str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns)
        for file in folder.rglob("*")
        if file.is_file()
    )
    digest = hashlib.sha256(repr((folder.resolve(), files)).encode()).hexdigest()
    return str(Path(HF_DATASETS_CACHE) / f"folder-{digest[:16]}")


def _holds_files(place: Path) -> bool:
    """Whether it is a zip, or a folder of images or sounds, or of zips of them, without tables.

    `datasets` would take a folder for what most of its files are.
    """
    if not place.is_dir():
        return place.is_file() and place.suffix.lower() == ".zip"
    names = {name for _, name in list_files(place)}
    if _lists_files(place) or any(
        Path(name).suffix.lower() in BUILDERS for name in names.difference(METADATA)
    ):
        return False
    return any(kind.has(n) or n.lower().endswith(".zip") for n in names for kind in KINDS)


def _shards(table: datasets.Dataset) -> int:
    """Into as many parts as workers may want to share."""
    return min(64, max(1, len(table)))
