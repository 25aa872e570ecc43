"""Features of a whole data set under an encoder, as a data set.

A split is cut into parts of a fixed number of rows, each a parquet file that is whole or not there.
The parts are shared out over the processes, and those that are whole are not made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml

from vicreg_hf.data.classes import renumber_classes
from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.data.splits import ImageSplit, image_split
from vicreg_hf.features.encoders import Encoder, open_encoder
from vicreg_hf.features.maps import map_encoder
from vicreg_hf.features.parts import (
    EMBEDDING,
    HEIGHT,
    MAP,
    WIDTH,
    parts_of,
    read_table,
    write_part,
)
from vicreg_hf.features.writing import complete_parts
from vicreg_hf.hub.api import HubError, open_repository, push_files, visible_files
from vicreg_hf.hub.push import describe_push
from vicreg_hf.hub.record import impersonal
from vicreg_hf.runtime.checks import read_range
from vicreg_hf.runtime.console import optional
from vicreg_hf.runtime.distributed import main_process_first, wait_for_all
from vicreg_hf.runtime.files import local_path, replacing, temporary_folder, writing
from vicreg_hf.runtime.machine import start_accelerator
from vicreg_hf.runtime.output_dir import claim
from vicreg_hf.settings.extraction import ExtractionArguments
from vicreg_hf.settings.searching import RECORD

BAD_IMAGES, CARD = "bad_images.jsonl", "README.md"
REMEDY = "What is finished is kept; free some space and start again."


def extract_dataset(args: ExtractionArguments) -> Path:
    """Write the features of every image of a data set.

    Each row has `row` (its number in the split), `image_id` (its path within the data set, or its
    number), `label` where the data have classes, and `embedding`.

    Returns:
        output_dir, which `datasets.load_dataset` opens.

    Raises:
        ValueError: a setting, model or data set that cannot be, or an output_dir in use.
        ImageError: too many images cannot be used.
        HubError: the Hub refuses, or cannot be reached.
    """
    with claim(Path(args.output_dir)):
        return _extract(args)


def _extract(args: ExtractionArguments) -> Path:
    accelerator = start_accelerator()
    datasets.disable_progress_bars()  # one is enough
    output_dir = Path(args.output_dir)
    main, repo_id = accelerator.is_main_process, str(args.hub_dataset_id)
    # now, as the disk of the data may be gone before the push
    named = args.publish_names or local_path(args.dataset_name) is None
    if args.push_to_hub and main:
        open_repository(repo_id, private=args.hub_private or None, repo_type="dataset")
    encoder = open_encoder(args.model, args.revision)
    encoder.module.to(accelerator.device)
    if args.features == "map":
        encoder = map_encoder(encoder)
    with main_process_first():
        splits = _open_splits(args, encoder)
    _check_record(args, encoder, splits, output_dir, write=main)
    describe = partial(
        describe_push, repo_id, shows=_shows(splits, named=named), licence="none",
        repo_type="dataset",
    )  # fmt: skip
    if main:
        if args.push_to_hub:
            print(describe(files=[CARD, "data/*.parquet"], later=True), flush=True)
        for left in (output_dir / "data").glob(".*.partial"):  # by a process that was killed
            left.unlink()
    wait_for_all()
    assert args.rows_per_file is not None
    parts = parts_of(splits, output_dir / "data", args.rows_per_file)
    complete_parts(
        encoder, splits, parts, accelerator, directory=output_dir, remedy=REMEDY,
        max_bad_fraction=args.max_bad_fraction, listed_in=output_dir / BAD_IMAGES,
        batch_size=args.batch_size, num_workers=args.num_workers, bf16=args.bf16,
        dtype=str(args.dtype), root=args.dataset_name,
    )  # fmt: skip
    if main:
        card = output_dir / CARD
        with optional(f"{card} is left out"), replacing(card) as aside:
            aside.write_text(_card(args, splits, encoder), encoding="utf-8")
        if args.push_to_hub:
            _push(describe, repo_id, output_dir, named=named)
    wait_for_all()
    accelerator.end_training()
    return output_dir


def _open_splits(args: ExtractionArguments, encoder: Encoder) -> dict[str, ImageSplit]:
    tables = open_dataset(args.dataset_name, args.dataset_config_name)
    names = [str(name) for name in tables] if args.split is None else [args.split]
    splits: dict[str, ImageSplit] = {}
    limits = read_range("value_range", args.value_range) or encoder.value_range
    for name in names:
        splits[name] = image_split(
            tables, name, dataset_name=Path(args.dataset_name).name, channels=encoder.in_chans,
            image_column=args.image_column, label_column=args.label_column, sound=encoder.sound,
            value_range=limits,
        )  # fmt: skip
        limits = splits[names[0]].value_range
    return _with_common_classes(splits)


def _with_common_classes(splits: dict[str, ImageSplit]) -> dict[str, ImageSplit]:
    """Number the classes of all splits alike, as `datasets` takes them to be; -1 is no class.

    Only in a data set without any labels has a split none.
    """
    if all(split.labels is None for split in splits.values()):
        return splits
    names = tuple(dict.fromkeys(name for split in splits.values() for name in split.label_names))
    numbered = {}
    for name, split in splits.items():
        labels = torch.full((len(split),), -1) if split.labels is None else split.labels
        if split.labels is not None and split.label_names:
            labels = renumber_classes(labels, split.label_names, names)
        numbered[name] = replace(split, labels=labels, label_names=names)
    return numbered


def _check_record(
    args: ExtractionArguments,
    encoder: Encoder,
    splits: dict[str, ImageSplit],
    output_dir: Path,
    *,
    write: bool,
) -> None:
    """Compare what is in output_dir with what is to be extracted, or record that."""
    record = {
        "encoder": encoder.fingerprint(), "dtype": args.dtype, "bf16": args.bf16,
        "rows_per_file": args.rows_per_file,
        "splits": {name: split.fingerprint() for name, split in splits.items()},
        "classes": list(next(iter(splits.values())).label_names),  # alike in all
    }  # fmt: skip
    # Where these are does not change the features, but `search` opens encoder and images again. So
    # the record says where they were at the newest start.
    places = {
        "model": _place(args.model), "revision": args.revision,
        "dataset_name": _place(args.dataset_name), "image_column": args.image_column,
        "dataset_config_name": args.dataset_config_name, "features": args.features,
    }  # fmt: skip
    path = output_dir / RECORD
    recorded = read_record(path)
    if recorded is None:
        recorded = record
    different = [name for name, value in record.items() if recorded.get(name) != value]
    if different:
        raise ValueError(
            f"output_dir must hold features of the same model, data and settings, and "
            f"{output_dir} holds others ({', '.join(different)} differ); choose another."
        )
    renewed = recorded | record | places
    if write and renewed != recorded:
        with writing(output_dir), replacing(path) as aside:
            output_dir.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(renewed, indent=2) + "\n")


def _place(name: str) -> str:
    """A name on the Hub as it is, and that of a local folder or file as an absolute path."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of the features in an output_dir; None if there are none."""
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        if not any((path.parent / "data").glob("*.parquet")):
            return None  # stopped before there were any
        raise ValueError(
            f"{path} must say which features are beside it, and is damaged ({error}); delete it if "
            "they are of the same model, data and settings, or choose another output_dir."
        ) from error


def _card(args: ExtractionArguments, splits: dict[str, ImageSplit], encoder: Encoder) -> str:
    # No `configs`: `datasets` finds splits by the names of files, and where a card lists these it
    # takes what it has cached of any folder of that name, whatever the files hold by now.
    metadata = yaml.safe_dump({"tags": ["embeddings"]})
    counts = ", ".join(f"{len(split):,} of {name}" for name, split in splits.items())
    kind, column = "Pooled features", EMBEDDING
    if encoder.map_size is not None:
        height, width = encoder.map_size
        kind = f"Feature maps of {height} x {width} positions, row by row, of the encoder's view,"
        column = f"{MAP}` (positions, features), `{HEIGHT}`, `{WIDTH}"
    return (
        f"---\n{metadata}---\n\n# Features of `{impersonal(args.dataset_name)}` by "
        f"`{impersonal(args.model)}`\n\n{kind} in {args.dtype}, one row for each image "
        f"({counts}), less those that cannot be decoded: `row`, `image_id`, `label` if there is "
        f"any, `{column}`. Written by `vicreg-hf extract` of vicreg_hf.\n"
    )


def _shows(splits: dict[str, ImageSplit], *, named: bool) -> str:
    """Sentences on what of the data is pushed; named is whether the names of files are."""
    classes = sorted({name for split in splits.values() for name in split.label_names})
    holds = ["features", *(["names of files"] if named else ["row numbers for names of files"])]
    holds += (
        [f"the classes {', '.join(classes[:20])}{', ...' * (len(classes) > 20)}"] if classes else []
    )
    shows = f"They hold no images, but {' and '.join(holds)}."
    return shows + ("" if named else " --publish_names true leaves the names of files.")


def _push(describe: Callable[..., str], repo_id: str, output_dir: Path, *, named: bool) -> None:
    """Push features, after they are described as `describe_push` does."""
    try:
        with temporary_folder() as folder:
            files = {
                name: file for name, file in visible_files(output_dir).items()
                if name == CARD or (name.startswith("data/") and name.endswith(".parquet"))
            }  # fmt: skip
            for name, file in files.items():
                if not named and name != CARD:
                    files[name] = _without_names(file, folder / name)
            print(describe(files=files))
            address = push_files(
                files, repo_id, repo_type="dataset", commit_message="Upload features",
                removable=lambda name: name.startswith("data/"),
            )  # fmt: skip
    except HubError as error:
        raise HubError(
            f"{error}\nThe features are whole in {output_dir}; the same command pushes them again."
        ) from None
    print(f"Published: {address}")


def _without_names(file: Path, copy: Path) -> Path:
    """Write a part of the features with row numbers in place of the names of files."""
    table = read_table(file)
    place = table.schema.get_field_index("image_id")
    rows = table["row"].cast("string")
    write_part(copy, table.set_column(place, table.schema.field(place), rows))
    return copy
