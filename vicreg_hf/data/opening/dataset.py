"""Data sets on the Hub, in a folder or in a file, opened by their names."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import config

from vicreg_hf.data.opening.archives import check_archives
from vicreg_hf.data.opening.class_names import restore_class_names
from vicreg_hf.data.opening.demo import load_demo
from vicreg_hf.data.opening.folders import (
    IMAGES,
    SOUNDS,
    File,
    column_of_paths,
    list_folder,
    list_zip,
    tables_of_splits,
)
from vicreg_hf.data.opening.metadata import METADATA, ONE, read_metadata
from vicreg_hf.data.opening.slicing import Splits
from vicreg_hf.runtime.files import FULL

DEMO = "demo"
NO_NAME_YET = "unnamed"
"""The data set's name in recipes for data of one's own, which must be replaced."""
TABLE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
"""The builder of `datasets` that opens a single file, by its ending."""
MISNAMED_METADATA = (".csv", ".tsv", ".jsonl")
"""Endings of files that may be meant as metadata, though they are not called so."""
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


def open_dataset(name: str, config_name: str | None = None, *, streaming: bool = False) -> Splits:
    """Open the splits of `demo`, a Hub id, a local folder or file.

    Args:
        config_name: the config of a Hub data set.
        streaming: open tables that are read as they are needed, and not copied to disk first.

    Raises:
        ValueError: nothing there that `datasets` can load; or what is loaded cannot be cached.
    """
    if name == NO_NAME_YET:
        raise ValueError(
            "dataset_name must be given, since this recipe is for data of your own: a data set on "
            "the Hub, or a local folder or file."
        )
    try:
        loaded = _load(name, config_name, streaming)
    except Exception as error:  # builders raise whatever their parsing meets
        if (fault := _cache_fault(error)) is not None:
            raise ValueError(
                f"the cache of data sets must be writable, got {config.HF_DATASETS_CACHE}: "
                f"{fault}; free some space, or set HF_HOME or HF_DATASETS_CACHE to another folder."
            ) from error
        reasons = [
            next(iter(str(each).strip().splitlines()), type(each).__name__)
            for each in (error, error.__cause__)
            if each is not None
        ]
        if reasons[-1] in reasons[0]:
            del reasons[1:]
        raise ValueError(
            f"dataset_name must be {DEMO}, a data set on the Hub, or a local folder or file that "
            f"datasets.load_dataset takes, got {name!r}: {' '.join(reasons)}"
        ) from error
    if isinstance(loaded, (datasets.Dataset, datasets.IterableDataset)):
        return {str(loaded.split or "train"): loaded}
    return loaded


def _cache_fault(error: BaseException | None) -> OSError | None:
    """The error that kept `datasets` from writing to its cache, among this one and its causes."""
    caches = [Path(cache) for cache in (config.HF_CACHE_HOME, config.HF_DATASETS_CACHE)]
    while error is not None:
        if isinstance(error, OSError):
            if error.errno in FULL or "disk space" in str(error):  # reading takes no room
                return error
            place = Path(os.fsdecode(error.filename or "/"))
            near = any(place.is_relative_to(c) or c.is_relative_to(place) for c in caches)
            if error.errno in NOT_WRITABLE and error.filename is not None and near:
                return error
        error = error.__cause__
    return None


def _load(name: str, config_name: str | None, streaming: bool) -> Any:
    path = Path(name)
    if name == DEMO:
        loaded = load_demo()
    elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        loaded = datasets.load_from_disk(name)
    elif _is_media(files := _list_files(path)) and not _card_has_configs(path):
        loaded = _tables_of_files(path, files)
    else:
        return _load_by_datasets(path, name, config_name, streaming, files)
    if config_name is not None:
        raise ValueError(f"{name} has no configs; leave out dataset_config_name.")
    if not streaming:
        return loaded
    if isinstance(loaded, datasets.Dataset):
        return _stream(loaded)
    return {split: _stream(table) for split, table in loaded.items()}


def _stream(table: datasets.Dataset) -> datasets.IterableDataset:
    """A stream of as many shards as workers may want to share."""
    return table.to_iterable_dataset(num_shards=min(64, max(1, len(table))))


def _list_files(path: Path) -> list[File]:
    """The files in a folder, or a zip itself."""
    if path.is_dir():
        return list_folder(path)
    file = File(os.path.abspath(path), path.name)
    return [file] if file.is_zip and path.is_file() else []


def _is_media(files: list[File]) -> bool:
    """Whether there are images or sounds, or zips which may hold them, and no tables or tars.

    `datasets` would take a folder for the commonest sort of its files.
    """
    if any(Path(f.name).suffix.lower() in TABLE_BUILDERS for f in files if f.name not in METADATA):
        return False
    return any(IMAGES.has(file.name) or SOUNDS.has(file.name) or file.is_zip for file in files)


def _tables_of_files(place: Path, files: list[File]) -> Splits:
    """Tables of the images in a folder or zip, or of its sounds where there are no images.

    Zips in a folder are read if nothing of that sort lies beside them.
    """
    zips = [file for file in files if file.is_zip]
    zipped: list[File] = []
    for file in zips:
        above = (*file.folders, Path(file.name).stem) if place.is_dir() else ()
        zipped += list_zip(file.path, above)
    for media, found in (
        (media, [file for file in among if media.has(file.name)])
        for media in (IMAGES, SOUNDS)
        for among in (files, zipped)
    ):
        if found:
            break
    else:
        raise ValueError(f"there are neither images nor sounds in {place}.")
    if zips and not found[0].in_zip:
        _warn(
            f"{len(zips)} zips in {place} are not read, as there are other files beside them: "
            f"{zips[0].path} is the first; unpack them, if these are not what was in them."
        )
    metadata = _find_metadata(files, zipped, media.plural, in_zip=found[0].in_zip)
    if not metadata:
        paths = pa.table({media.column: column_of_paths([file.path for file in found])})
        features = datasets.Features({media.column: media.feature})
        return tables_of_splits(found, paths, features, media, warn=_warn)
    rows = read_metadata(metadata, media)
    missing = [file.path for file in found if file.path not in rows.named]
    if len(missing) == len(found):
        raise ValueError(
            f"metadata must name files that are there, by their paths from its folder, and "
            f"{metadata[0].path} names none of the {len(found)} {media.plural} in {place}; it has "
            f"{rows.files[0].path}, and {found[0].path} is there."
        )
    uses = Counter(file.path for file in rows.files)
    if (again := uses.total() - len(uses)) > 0:
        _warn(
            f"{again} of {uses.total()} rows of metadata name {media.plural} that others name too, "
            f"as {uses.most_common(1)[0][0]}."
        )
    if missing:
        _warn(
            f"{len(missing)} of {len(found)} {media.plural} in {place} are left out, as no "
            f"metadata file lists them: {missing[0]} is the first."
        )
    return tables_of_splits(rows.files, rows.table, rows.features, media, warn=_warn)


def _find_metadata(
    files: list[File], zipped: list[File], plural: str, *, in_zip: bool
) -> list[File]:
    """The metadata files, unless they are not where the images are; warns of any that is not read.

    Args:
        files: those in the folder.
        zipped: those in its zips.
        plural: the word for images or sounds.
        in_zip: whether these are in zips.
    """
    tables, inside = (
        [
            file for file in among
            if file.name in METADATA or Path(file.name).suffix.lower() in MISNAMED_METADATA
        ]
        for among in (files, zipped)
    )  # fmt: skip
    tables = tables or inside
    metadata = [file for file in tables if file.name in METADATA]
    if metadata and metadata[0].in_zip != in_zip:
        _warn(f"{metadata[0].path} is not read, as the {plural} are not where it is.")
        return []
    if tables and not metadata:
        _warn(
            f"{tables[0].path} is not read: what belongs to each of the {plural} must be in a "
            f"file called {METADATA[0]}, with a column {ONE}."
        )
    return metadata


def _load_by_datasets(
    path: Path, name: str, config_name: str | None, streaming: bool, files: list[File]
) -> Any:
    if _is_main():
        check_archives(path)
    if path.is_file():
        builder = TABLE_BUILDERS.get(path.suffix.lower())
        if builder is None:
            raise ValueError(f"a file must end in {', '.join(TABLE_BUILDERS)} or .zip.")
        return datasets.load_dataset(builder, data_files=name, streaming=streaming)
    cache = _own_cache(path) if _card_has_configs(path) else None
    images = [file.path for file in files if IMAGES.has(file.name)]
    if images and cache is None:
        _warn(
            f"{len(images)} images in {path} are left out, as it holds tables or archives too: "
            f"{images[0]} is the first; move one or the other into a folder of its own."
        )
    loaded = datasets.load_dataset(name, config_name, streaming=streaming, cache_dir=cache)
    if path.is_dir() and isinstance(loaded, datasets.DatasetDict):
        builder = datasets.load_dataset_builder(name, config_name, cache_dir=cache)
        restore_class_names(loaded, builder.config.data_files or {})
    return loaded


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _warn(sentence: str) -> None:
    if _is_main():
        print(f"warning: {sentence}", file=sys.stderr)


def _card_has_configs(folder: Path) -> bool:
    """Whether the card of a folder lists the folder's files, which `datasets` then obeys."""
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
    return str(Path(config.HF_DATASETS_CACHE) / f"folder-{digest[:16]}")
