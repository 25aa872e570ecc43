"""Features of a whole data set under an encoder, as a data set.

A split is cut into parts of a fixed number of rows, each a parquet file that is whole or not there.
The parts are shared out over the processes, and those that are whole are not made again.

Shapes: B images, C channels, S side in pixels, F features.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
import yaml
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vicreg_hf.bad_images import BadImages, check_share
from vicreg_hf.checks import settle_kinds
from vicreg_hf.claiming import claim
from vicreg_hf.columns import BadImage
from vicreg_hf.cores import available_cores, default_num_workers, local_processes
from vicreg_hf.distributed import PATIENCE, failing_together
from vicreg_hf.encoders import Encoder, open_encoder
from vicreg_hf.evaluation.features import normalise_images
from vicreg_hf.feature_parts import Part, PartError, parts_of, read_part, write_part
from vicreg_hf.hub import HubError, check_repo_id, open_repository, push_folder
from vicreg_hf.loading import loading_errors
from vicreg_hf.opening import open_dataset
from vicreg_hf.reading import zip_and_name
from vicreg_hf.sources import ImageSplit, image_split, renumbered
from vicreg_hf.whole_files import replacing

RECORD, BAD_IMAGES = "extraction.json", "bad_images.jsonl"


def _setting(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass
class ExtractionArguments:
    """Settings of `extract_dataset`."""

    model: str = field(
        metadata={"help": "Encoder on the Hub, output_dir of a run, or directory of an encoder."}
    )
    dataset_name: str = field(metadata={"help": "As for pretrain.py: Hub id, folder or file."})
    output_dir: str = field(metadata={"help": "Where the features go; started again, it goes on."})
    dataset_config_name: str | None = _setting(None, "Configuration of a Hub data set.")
    split: str | None = _setting(None, "One split; by default all.")
    image_column: str | None = _setting(None, "Column of images; found by its type if only one.")
    label_column: str | None = _setting(
        None, "Column of classes to copy; by default the only one, or label."
    )
    revision: str | None = _setting(None, "Branch or commit of a model on the Hub.")
    batch_size: int = _setting(256, "Images at once in each process.")
    bf16: bool = _setting(False, "Compute in bfloat16; about twice as fast on recent hardware.")
    dtype: str = _setting("float32", "float32 or float16, of the features that are written.")
    rows_per_file: int = _setting(10_000, "Rows of a parquet file; a stop loses at most these.")
    num_workers: int | None = _setting(None, "Image-decoding workers per process.")
    max_bad_fraction: float = _setting(0.05, "Share of images that may be unusable; left out.")
    push_to_hub: bool = _setting(False, "Push the features as a data set; checked at the start.")
    hub_dataset_id: str | None = _setting(None, "Where to: org/name, made if absent.")
    hub_private: bool = _setting(False, "Make the repository private, if it is made.")

    def __post_init__(self) -> None:
        settle_kinds(self)
        for name in ("batch_size", "rows_per_file"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.dtype not in ("float32", "float16"):
            raise ValueError(f"dtype must be float32 or float16, got {self.dtype!r}.")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(
                f"max_bad_fraction must lie between 0 and 1, got {self.max_bad_fraction}."
            )
        if self.hub_dataset_id is not None:
            check_repo_id(self.hub_dataset_id, "hub_dataset_id")
        elif self.push_to_hub:
            raise ValueError("push_to_hub needs hub_dataset_id, org/name, and got none.")


class Batch(NamedTuple):
    """What a worker makes of some rows."""

    rows: list[int]
    paths: list[str | None]
    images: Tensor | None
    """(B, C, S, S), of the rows that have one; None if none has."""
    bad: list[BadImage]


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
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    datasets.disable_progress_bars()  # one is enough
    if accelerator.device.type == "cpu":
        torch.set_num_threads(max(1, available_cores() // local_processes(accelerator)))
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
    with loading_errors(), bf16, accelerator.autocast():
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


def features_of(
    encoder: Encoder,
    splits: dict[str, ImageSplit],
    parts: Sequence[Part],
    *,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    dtype: str = "float32",
    root: str = "",
    show: bool = False,
) -> Iterator[list[BadImage]]:
    """Write the features of some parts, and yield for each the images that could not be used.

    Args:
        encoder: its module on the device.
        parts: of the splits, in the order in which they are made.
        root: folder of the data, of which paths are shown as parts.
        show: a progress bar.
    """
    encoder.module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    pinned = device.type == "cuda"
    batches = [
        (part, part.rows[start : start + batch_size])
        for part in parts
        for start in range(0, len(part.rows), batch_size)
    ]
    loader = DataLoader(
        _Views(splits, batches, encoder), batch_size=None, num_workers=num_workers,
        pin_memory=pinned, prefetch_factor=4 if num_workers else None,
    )  # fmt: skip
    bar = tqdm(total=sum(len(part.rows) for part in parts), unit="image", disable=not show)
    # should all images of a part be bad, its column is as wide as the others'
    empty = torch.empty(0, encoder.num_features, device=device)
    made: list[Batch] = []
    features: list[Tensor] = []
    written: tuple[Future[None], list[BadImage]] | None = None
    with bar, ThreadPoolExecutor(1) as writer:
        for (part, rows), batch in zip(batches, loader, strict=True):
            made.append(batch)
            if batch.images is not None:
                features.append(_encode(encoder, batch.images, device))
            bar.update(len(rows))
            if rows[-1] != part.rows[-1]:
                continue
            if written is not None:
                written[0].result()
                yield written[1]
            found = torch.cat([empty, *features]).cpu().numpy()
            bad = [image for batch in made for image in batch.bad]
            # written while the next part is made
            done = writer.submit(_write, part, splits[part.split], made, found.astype(dtype), root)
            written, made, features = (done, bad), [], []
        if written is not None:
            written[0].result()
            yield written[1]


@torch.inference_mode()
def _encode(encoder: Encoder, images: Tensor, device: torch.device) -> Tensor:
    """(B, F) float32 on the device."""
    images = images.to(device, non_blocking=True)
    if images.dtype == torch.uint8:
        images = normalise_images(images, encoder.mean, encoder.std)
    features = encoder.module(images.to(memory_format=torch.channels_last)).float()
    if features.ndim != 2:
        raise ValueError(
            "the encoder must pool to shape (batch, features), got "
            f"{tuple(features.shape)}; remove global_pool from its model_args."
        )
    if not bool(features.isfinite().all()):
        raise ValueError(
            "the encoder must give finite features, and some are not; compute in float32, without "
            "--bf16 and --mixed_precision, or choose another checkpoint."
        )
    return features


class _Views(Dataset[Batch]):
    """Batches of rows as the encoder's own evaluation views."""

    def __init__(
        self, splits: dict[str, ImageSplit], batches: list[tuple[Part, range]], encoder: Encoder
    ) -> None:
        self.splits, self.batches, self.prepare = splits, batches, encoder.prepare

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        part, wanted = self.batches[index]
        rows, paths, images, bad = [], [], [], []
        found = self.splits[part.split].try_read(wanted)
        for row, (image, path) in zip(wanted, found, strict=True):
            if isinstance(image, BadImage):
                bad.append(image)
                continue
            rows.append(row)
            paths.append(path)
            images.append(self.prepare(image))
        return Batch(rows, paths, torch.stack(images) if images else None, bad)


def _write(
    part: Part,
    split: ImageSplit,
    batches: list[Batch],
    features: NDArray[np.floating[Any]],
    root: str,
) -> None:
    """The features of a part as parquet, whole or not at all."""
    rows = [row for batch in batches for row in batch.rows]
    paths = [path for batch in batches for path in batch.paths]
    width = features.shape[1]
    ids = [_image_id(row, path, root) for row, path in zip(rows, paths, strict=True)]
    # from_dict would take each number by itself
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), width)
    arrays = [pa.array(rows, pa.int64()), pa.array(ids, pa.string()), embedding]
    kinds: dict[str, Any] = {
        "row": datasets.Value("int64"),
        "image_id": datasets.Value("string"),
        "embedding": datasets.List(datasets.Value(str(features.dtype)), length=width),
    }
    if split.labels is not None:
        arrays.append(pa.array(split.labels[torch.tensor(rows, dtype=torch.long)].numpy()))
        names = list(split.label_names)
        kinds["label"] = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    table = pa.Table.from_arrays(arrays, schema=datasets.Features(kinds).arrow_schema)
    write_part(part.file, table)


def _image_id(row: int, path: str | None, root: str) -> str:
    """Never a path of this machine."""
    if path is None:
        return str(row)
    archive, path = zip_and_name(path)
    if archive is not None:
        several = Path(root).is_dir()
        return f"{_image_id(row, archive, root)}/{path}" if several else path
    if Path(path).is_absolute():
        folder = Path(root).resolve()
        inside = Path(path).is_relative_to(folder)
        return Path(path).relative_to(folder).as_posix() if inside else Path(path).name
    return path


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
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            with replacing(path) as aside:
                aside.write_text(json.dumps(record, indent=2) + "\n")
        except OSError as error:
            raise ValueError(
                f"output_dir must be a directory that can be written, got {output_dir}: {error}."
            ) from error


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
        address = push_folder(
            output_dir, str(args.hub_dataset_id), repo_type="dataset",
            commit_message="Upload features", ignore=(RECORD, BAD_IMAGES),
            removable=lambda name: name.startswith("data/"),
        )  # fmt: skip
    except HubError as error:
        raise HubError(
            f"{error}\nThe features are whole in {output_dir}; the same command pushes them again."
        ) from None
    print(f"Published: {address}")
