"""Features of a whole data set under an encoder, as a data set.

A split is cut into parts of a fixed number of rows, each a parquet file that is whole or not there.
The parts are shared out over the processes, and those that are whole are not made again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object

from vicreg_hf.data.bad_images import BadImages, check_share
from vicreg_hf.data.columns.base import BadImage
from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.data.splits import ImageSplit, image_split, renumbered
from vicreg_hf.data.workers import loading_errors
from vicreg_hf.features.encode import features_of
from vicreg_hf.features.encoders import Encoder, open_encoder
from vicreg_hf.features.parts import Part, PartError, parts_of, read_part
from vicreg_hf.hub.api import HubError, open_repository, push_files, visible_files
from vicreg_hf.runtime.distributed import failing_together
from vicreg_hf.runtime.files import replacing, writing
from vicreg_hf.runtime.machine import default_num_workers, local_processes
from vicreg_hf.runtime.output_dir import claim
from vicreg_hf.runtime.processes import start_accelerator
from vicreg_hf.settings.extraction import ExtractionArguments

RECORD, BAD_IMAGES = "extraction.json", "bad_images.jsonl"


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
    main = accelerator.is_main_process
    if args.push_to_hub and main:
        open_repository(
            str(args.hub_dataset_id), private=args.hub_private or None, repo_type="dataset"
        )
    encoder = open_encoder(args.model, args.revision)
    encoder.module.to(accelerator.device)
    with accelerator.main_process_first():
        splits = _open_splits(args, encoder)
    _remember(args, encoder, splits, output_dir, write=main)
    if main:
        for left in (output_dir / "data").glob(".*.partial"):  # by a process that was killed
            left.unlink()
    accelerator.wait_for_everyone()
    parts = parts_of(splits, output_dir / "data", args.rows_per_file)
    seen = sum(len(split) for split in splits.values())
    bad = BadImages(seen, args.max_bad_fraction, output_dir / BAD_IMAGES, fate="left out")
    missing, left_out = _to_make(parts, splits, encoder.num_features, accelerator)
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    workers = args.num_workers
    if workers is None:
        workers = default_num_workers(local_processes(accelerator))
    bf16 = torch.autocast(accelerator.device.type, torch.bfloat16) if args.bf16 else nullcontext()
    remedy = "What is finished is kept; free some space and start again."
    with writing(output_dir, remedy=remedy), loading_errors(), bf16, accelerator.autocast():
        for part in features_of(
            encoder, splits, mine, device=accelerator.device,
            batch_size=args.batch_size, num_workers=workers, dtype=args.dtype,
            root=args.dataset_name, show=accelerator.is_local_main_process,
        ):  # fmt: skip
            left_out += part
    if main:
        bad.forget()  # what earlier runs have listed is found again
    bad.add(left_out)
    bad.agree(gather_object, seen=seen, write=main, say=accelerator.print)
    check_share(sum(gather_object([len(left_out)])), seen, args.max_bad_fraction)
    accelerator.wait_for_everyone()
    if main:
        (output_dir / "README.md").write_text(_card(args, splits), encoding="utf-8")
        if args.push_to_hub:
            _push(args, output_dir)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return output_dir


def _to_make(
    parts: Sequence[Part],
    splits: dict[str, ImageSplit],
    num_features: int,
    accelerator: Accelerator,
) -> tuple[list[Part], list[BadImage]]:
    """Look through the parts that are there, which the processes share out.

    Returns:
        The parts to make; and of the others that this process has seen, the images they lack.
    """
    own: list[int] = []
    left_out: list[BadImage] = []
    with failing_together(accelerator.device), loading_errors():
        for number in range(accelerator.process_index, len(parts), accelerator.num_processes):
            part = parts[number]
            try:
                left_out += _lacking(part, splits[part.split], num_features)
            except FileNotFoundError:
                own.append(number)
            except PartError as error:
                print(f"warning: {part.file} is damaged and is made again: {error}.", flush=True)
                own.append(number)
    return [parts[number] for number in sorted(gather_object(own))], left_out


def _lacking(part: Part, split: ImageSplit, num_features: int) -> list[BadImage]:
    """The images of a part that it lacks, each of which must be one that cannot be used."""
    contents = read_part(part, num_features)
    rows = sorted({*part.rows} - {*contents.rows.tolist()})
    found = [image for image, _ in split.try_read(rows)] if rows else []
    bad = [image for image in found if isinstance(image, BadImage)]
    if len(bad) < len(rows):
        raise PartError(f"it lacks {len(rows) - len(bad)} images that can be used")
    return bad


def _open_splits(args: ExtractionArguments, encoder: Encoder) -> dict[str, ImageSplit]:
    tables = open_dataset(args.dataset_name, args.dataset_config_name)
    names = [str(name) for name in tables] if args.split is None else [args.split]
    splits = {
        name: image_split(
            tables, name, dataset_name=Path(args.dataset_name).name, channels=encoder.in_chans,
            image_column=args.image_column, label_column=args.label_column, sound=encoder.sound,
        )
        for name in names
    }  # fmt: skip
    return dict(zip(splits, _of_the_same_classes(list(splits.values())), strict=True))


def _of_the_same_classes(splits: list[ImageSplit]) -> list[ImageSplit]:
    """Splits whose numbers all mean the same names, as `datasets` takes them to; -1 is no class.

    Only in a data set without any labels has a split none.
    """
    if all(split.labels is None for split in splits):
        return splits
    names = tuple(dict.fromkeys(name for split in splits for name in split.label_names))
    found = []
    for split in splits:
        labels = torch.full((len(split),), -1) if split.labels is None else split.labels
        if split.labels is not None and split.label_names:
            labels = renumbered(labels, [names.index(name) for name in split.label_names])
        found.append(replace(split, labels=labels, label_names=names))
    return found


def _remember(
    args: ExtractionArguments,
    encoder: Encoder,
    splits: dict[str, ImageSplit],
    output_dir: Path,
    *,
    write: bool,
) -> None:
    """Make sure that what is in output_dir is of the same features."""
    record = {
        "encoder": encoder.fingerprint(), "dtype": args.dtype, "bf16": args.bf16,
        "rows_per_file": args.rows_per_file,
        "splits": {name: split.fingerprint() for name, split in splits.items()},
        "classes": list(next(iter(splits.values())).label_names),  # alike in all
    }  # fmt: skip
    path = output_dir / RECORD
    earlier = _recorded(path)
    if earlier is not None:
        other = [name for name, value in record.items() if earlier.get(name) != value]
        if other:
            raise ValueError(
                f"output_dir must hold features of the same model, data and settings, and "
                f"{output_dir} holds others ({', '.join(other)} differ); choose another."
            )
    elif write:
        with writing(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
            with replacing(path) as aside:
                aside.write_text(json.dumps(record, indent=2) + "\n")


def _recorded(path: Path) -> dict[str, Any] | None:
    """What is known of the features in an output_dir; None if there are none."""
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


def _card(args: ExtractionArguments, splits: dict[str, ImageSplit]) -> str:
    def name(given: str) -> str:
        return Path(given).resolve().name if Path(given).exists() else given

    # No `configs`: `datasets` finds splits by the names of files, and where a card lists these it
    # takes what it has cached of any folder of that name, whatever the files hold by now.
    metadata = yaml.safe_dump({"tags": ["embeddings"]})
    counts = ", ".join(f"{len(split):,} of {name}" for name, split in splits.items())
    return (
        f"---\n{metadata}---\n\n# Features of `{name(args.dataset_name)}` by "
        f"`{name(args.model)}`\n\nPooled features in {args.dtype}, one row for each image "
        f"({counts}), less those that cannot be decoded: `row`, `image_id`, `label` if there is "
        "any, `embedding`. Written by `scripts/extract_features.py` of vicreg_hf.\n"
    )


def _push(args: ExtractionArguments, output_dir: Path) -> None:
    try:
        address = push_files(
            visible_files(output_dir, ignore=(RECORD, BAD_IMAGES)), str(args.hub_dataset_id),
            repo_type="dataset", commit_message="Upload features",
            removable=lambda name: name.startswith("data/"),
        )  # fmt: skip
    except HubError as error:
        raise HubError(
            f"{error}\nThe features are whole in {output_dir}; the same command pushes them again."
        ) from None
    print(f"Published: {address}")
