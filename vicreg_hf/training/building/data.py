"""From a run's settings to its images: which data, in which order, seen how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor

from vicreg_hf.data.bad_images import BadImages
from vicreg_hf.data.columns.spectrograms import SpectrogramColumn, SpectrogramSettings
from vicreg_hf.data.memory import MEMORY_BUDGET, common_side, load_in_memory
from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.data.opening.slicing import add_parts
from vicreg_hf.data.pairs import PairedSplit
from vicreg_hf.data.sampler import GlobalBatches
from vicreg_hf.data.splits import ImageSplit, held_out_split, image_split
from vicreg_hf.data.streams import ImageStream, image_stream
from vicreg_hf.runtime.machine import default_num_workers
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.building.second_branch import (
    run_column,
    spectrogram_settings,
    takes_waveforms,
)

LOCAL_SHARE = 96 / 224
"""Of a local view's side in a global one's (SwAV, arXiv:2006.09882)."""


@dataclass
class Inputs:
    """The images of a run, and the order in which they come."""

    train: ImageSplit | ImageStream
    images: ImageSplit | PairedSplit | ImageStream | Tensor
    """The same: to decode as they come, alone or with what belongs to them, or in memory."""
    held_out: ImageSplit | None
    batches: GlobalBatches
    total_steps: int
    bad: BadImages

    @property
    def pairs(self) -> PairedSplit | None:
        """The samples, where the second branch takes something else than the images."""
        return self.images if isinstance(self.images, PairedSplit) else None

    @property
    def sound(self) -> SpectrogramSettings | None:
        """How sounds become images, where there are no images."""
        column = self.train.column
        return column.settings if isinstance(column, SpectrogramColumn) else None

    def fingerprint(self) -> dict[str, Any]:
        """What tells these data from others."""
        return (self.pairs or self.train).fingerprint()


def open_inputs(
    args: PretrainingArguments,
    *,
    rank: int = 0,
    world_size: int = 1,
    local_processes: int = 1,
    main_first: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Inputs:
    """Find the data, and settle what the settings leave to it.

    Args:
        args: filled in where they are None.
        rank: of this process; world_size says of how many.
        local_processes: how many share this machine's cores.
        main_first: in whose context the data are opened, so that one process prepares the cache.

    Raises:
        ValueError: data that are not there, or settings that do not suit them.
        ImageError: hardly an image can be used.
    """
    train, held_out, pairs = _open_splits(args, main_first)
    batches = GlobalBatches(
        _num_images(train, args), args.batch_size, seed=args.seed, rank=rank,
        world_size=world_size, micro_batch_size=args.micro_batch_size,
    )  # fmt: skip
    total_steps = args.max_steps or int(args.num_train_epochs * batches.steps_per_epoch)
    if total_steps < 1:
        raise ValueError(
            f"num_train_epochs must give at least one step, got {args.num_train_epochs} epochs of "
            f"{batches.steps_per_epoch} steps; use max_steps."
        )
    if args.warmup_epochs is None:
        args.warmup_epochs = min(10.0, total_steps // 10 / batches.steps_per_epoch)
    log = Path(str(args.output_dir)) / "bad_images.jsonl"
    bad = BadImages(train.num_images, args.max_bad_fraction, log)
    images: ImageSplit | PairedSplit | ImageStream | Tensor = pairs or train
    side = None
    if isinstance(train, ImageSplit):
        side = common_side(train)
        loaded = None if side is None or pairs is not None else load_in_memory(train, bad=bad)
        if loaded is not None:
            images = loaded
        elif (
            side is not None and pairs is None
            and args.in_chans * side * side * len(train) <= MEMORY_BUDGET
        ):  # fmt: skip
            side = None  # the first images are alike, but not all
    else:
        images = train.share(rank, world_size, seed=args.seed)
    args.image_column = train.column.name
    sound = train.column.settings if isinstance(train.column, SpectrogramColumn) else None
    default_side = 224 if sound is None else sound.num_mels
    args.image_size = args.image_size or side or default_side
    usual = "authors" if side is None else "cifar"
    args.augmentation = args.augmentation or (usual if sound is None else "audio")
    _settle_views(args)
    if args.num_workers is None:
        args.num_workers = default_num_workers(local_processes)
    return Inputs(train, images, held_out, batches, total_steps, bad)


def _settle_views(args: PretrainingArguments) -> None:
    """The sides of views that are not the first."""
    assert args.image_size is not None
    seen = args.prime_modality in ("image", "audio") and not takes_waveforms(args)
    if seen and args.prime_image_size is None:
        args.prime_image_size = args.image_size
    if args.num_local_views and args.local_image_size is None:
        args.local_image_size = max(8, round(args.image_size * LOCAL_SHARE / 8) * 8)


def _open_splits(
    args: PretrainingArguments, main_first: Callable[[], AbstractContextManager[Any]]
) -> tuple[ImageSplit | ImageStream, ImageSplit | None, PairedSplit | None]:
    """The training split, the held-out one if there is any, and the samples of two columns."""
    with main_first():
        splits = open_dataset(args.dataset_name, args.dataset_config_name, streaming=args.streaming)
    splits = add_parts(splits, train_split=args.train_split, eval_split=args.eval_split)
    columns: Any = {
        "dataset_name": Path(args.dataset_name).name or args.dataset_name,
        "image_column": args.image_column,
        "channels": args.in_chans,
    }
    features = getattr(splits[args.train_split], "features", None) or {}
    if holds_sound(features, args.image_column):
        assert not isinstance(args.model_args, str)
        args.model_args = {"in_chans": 1} | (args.model_args or {})
        columns |= {"channels": args.in_chans, "sound": spectrogram_settings(args)}
    if args.streaming:
        return image_stream(splits, args.train_split, **columns), None, None
    columns["label_column"] = args.label_column
    train = image_split(splits, args.train_split, **columns)
    held_out, name = held_out_split(splits, args.eval_split, args.train_split, **columns)
    args.eval_split = args.eval_split or name
    pairs = None
    if args.is_paired:
        table = splits[args.train_split]
        column = run_column(args, table)
        args.prime_column = column.name
        pairs = PairedSplit(train, column.prepare(table), column)
    return train, held_out, pairs


def holds_sound(features: Mapping[str, Any], column: str | None) -> bool:
    """Whether it is sounds that a run sees as images."""
    if column is not None:
        return isinstance(features.get(column), datasets.Audio)
    kinds = list(features.values())
    seen = any(isinstance(kind, (datasets.Image, datasets.Array3D)) for kind in kinds)
    return not seen and any(isinstance(kind, datasets.Audio) for kind in kinds)


def _num_images(train: ImageSplit | ImageStream, args: PretrainingArguments) -> int:
    if train.num_images is not None:
        return train.num_images
    if args.max_steps is None:
        raise ValueError(
            f"max_steps must be given for streams of unknown length, and {train.name} does not "
            "say how many images it holds."
        )
    return args.max_steps * args.batch_size  # what the run will see is its epoch
