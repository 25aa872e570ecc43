"""Data sets on the Hub, in a folder or in a file, opened by their names."""

from __future__ import annotations

import difflib
import errno
import os
from collections import Counter
from itertools import product
from pathlib import Path

import datasets
import pyarrow as pa
from datasets import config
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from vicreg_hf.data.columns.reading import zip_and_name
from vicreg_hf.data.opening import DEMO
from vicreg_hf.data.opening.demo import load_demo
from vicreg_hf.data.opening.folders import IMAGES, SOUNDS, column_of_paths, tables_of_splits
from vicreg_hf.data.opening.listing import (
    Listing,
    count_left_out,
    describe_endings,
    list_folder,
    list_zip,
    suffix_of,
)
from vicreg_hf.data.opening.metadata import METADATA, ONE, read_metadata
from vicreg_hf.data.opening.slicing import Splits
from vicreg_hf.data.opening.tables import FORMATS, TABLE_BUILDERS, card_has_configs, load_tables
from vicreg_hf.data.opening.tars import load_dataset
from vicreg_hf.runtime.checks import fault_at_hub
from vicreg_hf.runtime.console import warn
from vicreg_hf.runtime.files import FULL, local_path, utf8_path

NO_NAME_YET = "unnamed"
"""The data set's name in recipes for data of one's own, which must be replaced."""
SAVED = ("dataset_dict.json", "state.json")
"""Files that `save_to_disk` writes."""
MAY_BE_METADATA = (".csv", ".tsv", ".jsonl", ".parquet")
"""Endings of files that may be meant as metadata, also if they are not called so."""
ENDINGS = IMAGES.suffixes | SOUNDS.suffixes | {*TABLE_BUILDERS, *MAY_BE_METADATA, ".zip", ".npy"}
"""Endings of names that are files on this machine, and no data sets on the Hub."""
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


def open_dataset(name: str, config_name: str | None = None, *, streaming: bool = False) -> Splits:
    """Open the splits of `demo`, a Hub id, a local folder or file.

    Args:
        config_name: the config of a Hub data set.
        streaming: open tables that are read as they are needed, and not copied to disk first.

    Raises:
        ValueError: nothing there that `datasets` can load; or what is loaded cannot be cached.
    """
    if not name.strip():
        raise ValueError(f"dataset_name must name data, got {name!r}; {DEMO} is built in.")
    if name == NO_NAME_YET:
        raise ValueError(
            "dataset_name must be given, since this recipe is for data of your own: a data set on "
            "the Hub, or a local folder or file."
        )
    try:
        return _load(name, config_name, streaming)
    except Exception as error:  # builders raise whatever their parsing meets
        if (fault := _cache_fault(error)) is not None:
            raise ValueError(
                f"the cache of data sets must be writable, got {config.HF_DATASETS_CACHE}: "
                f"{fault}; free some space, or set HF_HOME or HF_DATASETS_CACHE to another folder."
            ) from error
        innermost: BaseException = error
        while innermost.__cause__ is not None:
            innermost = innermost.__cause__
        first, cause = (
            next(iter(str(each).strip().splitlines()), type(each).__name__)
            for each in (error, innermost)
        )
        reason = first if cause in first else f"{first.rstrip('.')}: {cause}"
        raise ValueError(
            f"dataset_name must be {DEMO}, a data set on the Hub, or a local folder or file that "
            f"datasets.load_dataset takes, got {name!r}: {reason}"
        ) from error


def _cache_fault(error: BaseException | None) -> OSError | None:
    """The error that kept `datasets` from writing to its cache, among this one and its causes."""
    caches = [Path(cache) for cache in (config.HF_CACHE_HOME, config.HF_DATASETS_CACHE)]
    while error is not None:
        if isinstance(error, OSError) and (error.errno in FULL or "disk space" in str(error)):
            return error  # reading takes no room
        if isinstance(error, OSError) and error.errno in NOT_WRITABLE and error.filename:
            place = Path(os.fsdecode(error.filename))
            if any(place.is_relative_to(c) or c.is_relative_to(place) for c in caches):
                return error
        error = error.__cause__
    return None


def _load(name: str, config_name: str | None, streaming: bool) -> Splits:
    local = local_path(name)
    if name == DEMO:
        if local is not None:
            warn(
                f"{DEMO} is the data set that is built in, and not {local}; write ./{DEMO} for it."
            )
        splits = load_demo()
    elif local is None:
        return _open_from_hub(name, config_name, streaming)
    elif any(os.path.isfile(os.path.join(local, each)) for each in SAVED):
        splits = datasets.load_from_disk(local)
        if isinstance(splits, datasets.Dataset):
            splits = {str(splits.split or "train"): splits}
    else:
        path, place = Path(local), utf8_path(local)
        listing = list_folder(place, warn) if path.is_dir() else Listing([place])
        media = _holds_media(listing.files) if path.is_dir() else suffix_of(place) == ".zip"
        if not media or card_has_configs(path):
            return load_tables(path, config_name, listing, streaming=streaming)
        splits = _tables_of_files(place, listing.files)
    if config_name is not None:
        raise ValueError(f"{name} has no configs; leave out dataset_config_name.")
    if not streaming:
        return splits
    return {
        split: table.to_iterable_dataset(num_shards=min(64, max(1, len(table))))  # for workers
        for split, table in splits.items()
    }


def _open_from_hub(name: str, config_name: str | None, streaming: bool) -> Splits:
    """Open a data set of the Hub, which is asked once whether it has one of this name.

    Where it has none, or does not answer, the data set may still be in the cache.

    Raises:
        ValueError: there is none, and nothing of this name on this machine either.
    """
    place = Path(os.path.abspath(os.path.expanduser(name)))
    nowhere = f"there is no file or folder {place}"
    if place.parent.is_dir():
        near = difflib.get_close_matches(place.name, os.listdir(place.parent), n=1, cutoff=0.75)
        nowhere += "".join(f", but {place.parent / each}" for each in near)
    if name in FORMATS or _is_path(name):  # `datasets` would take formats for what lies right here
        raise ValueError(f"{nowhere}.")
    fault = None if "://" in name else fault_at_hub(name, "dataset")
    if fault is None:
        return load_dataset(name, config_name, streaming=streaming)[0]
    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True  # it would ask five times
    try:
        return load_dataset(name, config_name, streaming=streaming)[0]
    except Exception:  # it is not in the cache either
        raise ValueError(f"{nowhere}, and {fault}.") from None
    finally:
        config.HF_HUB_OFFLINE = before


def _is_path(name: str) -> bool:
    """Whether a name can be a path alone, and no id on the Hub."""
    if "://" in name:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return name.startswith(".") or suffix_of(name) in ENDINGS


def _holds_media(files: list[str]) -> bool:
    """Whether there are images or sounds, or zips which may hold them, and no tables or tars.

    `datasets` would take a folder for the commonest sort of its files.
    """
    suffixes = {suffix_of(file) for file in files if os.path.basename(file) not in METADATA}
    return suffixes.isdisjoint(TABLE_BUILDERS) and not suffixes.isdisjoint(
        IMAGES.suffixes | SOUNDS.suffixes | {".zip"}
    )


def _tables_of_files(place: str, files: list[str]) -> Splits:
    """Tables of the images in a folder or zip, or of its sounds where there are no images.

    Zips in a folder are read if nothing of that sort lies beside them.
    """
    zips = [file for file in files if suffix_of(file) == ".zip"]
    zipped = [file for archive in zips for file in list_zip(archive, warn)]
    found: list[str] = []
    for media, among in product((IMAGES, SOUNDS), (files, zipped)):
        if found := list(filter(media.has, among)):
            break
    else:
        raise ValueError(f"there are neither images nor sounds in {place}.")
    if zips and among is files:
        count_left_out(len(zips), "zips are not read where other files lie beside them")
        warn(
            f"{len(zips)} zips in {place} are not read, as there are other files beside them: "
            f"{zips[0]} is the first; unpack them, if these are not what was in them."
        )
    number, endings = describe_endings(file for file in among if not media.has(file))
    if number:
        count_left_out(number, f"their endings are not those of {media.plural}")
        warn(
            f"{number} of {len(found) + number} files in {place} are left out, as their endings "
            f"are not those of {media.plural}: {endings}; rename them if they are {media.plural}."
        )
    tables = [file for file in files + zipped if suffix_of(file) in MAY_BE_METADATA]
    metadata = [file for file in among if os.path.basename(zip_and_name(file)[1]) in METADATA]
    if not metadata:
        if tables:
            warn(
                f"{tables[0]} is not read: what belongs to each of the {media.plural} must be in a "
                f"file called {METADATA[0]} beside or above them, with a column {ONE}."
            )
        paths = pa.table({media.column: column_of_paths(found)})
        return tables_of_splits(place, found, paths, {media.column: media.feature}, warn=warn)
    rows = read_metadata(metadata, media, among)
    missing = [file for file in found if file not in rows.named]
    if len(missing) == len(found):
        raise ValueError(
            f"metadata must name files that are there, by their paths from its folder, and "
            f"{metadata[0]} names none of the {len(found)} {media.plural} in {place}; it has "
            f"{rows.files[0]}, and {found[0]} is there."
        )
    ((first, uses),) = Counter(rows.files).most_common(1)
    if uses > 1:
        warn(
            f"{len(rows.files) - len(set(rows.files))} of {len(rows.files)} rows of metadata name "
            f"{media.plural} that others name too, as {first}."
        )
    if missing:
        count_left_out(len(missing), "no metadata file lists them")
        warn(
            f"{len(missing)} of {len(found)} {media.plural} in {place} are left out, as no "
            f"metadata file lists them: {missing[0]} is the first."
        )
    return tables_of_splits(place, rows.files, rows.table, rows.features, warn=warn)
