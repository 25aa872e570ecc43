"""Tables and tars in a local folder or file, which `datasets` opens."""

from __future__ import annotations

import glob
import hashlib
import os
from pathlib import Path
from typing import Any

import datasets
from datasets import config
from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns
from datasets.load import infer_module_for_data_files
from datasets.packaged_modules import (
    _ALL_EXTENSIONS,
    _MODULE_TO_EXTENSIONS,
    _PACKAGED_DATASETS_MODULES,
)
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, metadata_load

from vicreg_hf.data.opening.archives import check_archives
from vicreg_hf.data.opening.class_names import restore_class_names
from vicreg_hf.data.opening.folders import IMAGES
from vicreg_hf.data.opening.listing import (
    Listing,
    count_left_out,
    describe_endings,
    hold_arrays,
    suffix_of,
)
from vicreg_hf.data.opening.slicing import Splits
from vicreg_hf.data.opening.tars import load_dataset
from vicreg_hf.runtime.console import is_main, warn

TABLE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
"""The builder of `datasets` that opens a single file, by its ending."""
FORMATS = frozenset(_PACKAGED_DATASETS_MODULES)
"""Names that `datasets` takes for its own builders."""
CARD = "README.md"


def load_tables(
    path: Path, config_name: str | None, listing: Listing, *, streaming: bool
) -> Splits:
    """Open the tables of a folder, or of a single file, by its absolute path.

    Raises:
        ValueError: an archive that holds what it must not; files of arrays, of which tables must
            be made first; or a file of another sort.
        Exception: whatever the builders of `datasets` meet.
    """
    try:
        loaded = _load(path, config_name, listing, streaming)
        kinds = [kind for each in loaded.values() for kind in (each.features or {}).values()]
        if hold_arrays(listing.files) and datasets.Array3D not in map(type, kinds):
            raise ValueError("arrays without a column of images")
    except Exception as error:
        number, endings = describe_endings(
            file for file in listing.files if suffix_of(file) not in TABLE_BUILDERS
        )
        if hold_arrays(listing.files):
            raise ValueError(
                f"files of arrays must be made a table first, and there are {endings}: read them "
                "as arrays (channels, height, width), and write "
                "datasets.Dataset.from_dict({'image': arrays}, features=datasets.Features("
                "{'image': datasets.Array3D((C, H, W), 'uint8')})).to_parquet('train.parquet'), or "
                "save each as PNG."
            ) from error
        if number and path.is_dir():
            raise ValueError(f"{error}; by their endings, there are {endings}.") from error
        raise
    return loaded


def card_has_configs(folder: Path) -> bool:
    """Whether the card of a folder lists the folder's files, which `datasets` then obeys."""
    card = folder / CARD
    try:
        return card.is_file() and "configs" in (metadata_load(card) or {})
    except ValueError:  # its head is no YAML
        return False


def _load(path: Path, config_name: str | None, listing: Listing, streaming: bool) -> Any:
    if is_main():
        check_archives(path)
    if path.is_file():
        builder = TABLE_BUILDERS.get(path.suffix.lower())
        if builder is None:
            raise ValueError(f"a file must end in {', '.join(TABLE_BUILDERS)} or .zip.")
        return load_dataset(builder, data_files=glob.escape(str(path)), streaming=streaming)[0]
    card = card_has_configs(path)
    source: dict[str, Any] = {"path": str(path), "name": config_name}
    if card:
        source["cache_dir"] = _own_cache(path)
    if glob.has_magic(str(path.resolve())) or (listing.passed_over and not card):
        source |= _listed(path.resolve(), config_name if card else None, listing, card)
    loaded, files = load_dataset(**source, streaming=streaming)
    if isinstance(loaded, datasets.DatasetDict):
        restore_class_names(loaded, files)
    if not card:
        read = {os.path.realpath(str(file)) for each in files.values() for file in each}
        _tell_unread(path, [f for f in listing.files if os.path.realpath(f) not in read])
    return loaded


def _listed(folder: Path, config_name: str | None, listing: Listing, card: bool) -> dict[str, Any]:
    """Find the arguments by which `load_dataset` opens a folder by a list of its files.

    It would take brackets in the folder's own path for a pattern, and read what is left out.
    """
    base, patterns = glob.escape(str(folder)), None
    if card:
        data: Any = DatasetCard.load(folder / CARD).data
        configs = MetadataConfigs.from_dataset_card_data(data)
        name = config_name or configs.get_default_config_name() or next(iter(configs))
        patterns = configs[name].get("data_files")
    found = DataFilesDict.from_patterns(
        get_data_patterns(base) if patterns is None else sanitize_patterns(patterns),
        base_path=base, allowed_extensions=_ALL_EXTENSIONS,
    )  # fmt: skip
    seen = {os.path.realpath(file) for file in listing.files}
    kept: Any = {
        split: left for split, files in found.items() if (left := [f for f in files if f in seen])
    }
    module, options = infer_module_for_data_files(kept, path=str(folder))
    endings = tuple(_MODULE_TO_EXTENSIONS[str(module)])
    files = {
        split: [glob.escape(file) for file in each if file.lower().endswith(endings)]
        for split, each in kept.items()
    }
    return {"path": module, "name": None, "data_files": files, **options}


def _tell_unread(folder: Path, unread: list[str]) -> None:
    images = list(filter(IMAGES.has, unread))
    tables = [file for file in unread if suffix_of(file) in TABLE_BUILDERS]
    if images:
        count_left_out(len(images), "tables or archives lie beside them")
        warn(
            f"{len(images)} images in {folder} are left out, as it holds tables or archives too: "
            f"{images[0]} is the first; move one or the other into a folder of its own."
        )
    if tables:
        count_left_out(len(tables), "their names are not those of splits")
        warn(
            f"{len(tables)} tables or archives in {folder} are left out, as their names are not "
            f"those of its splits: {tables[0]} is the first; move them into a folder of their own."
        )


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
