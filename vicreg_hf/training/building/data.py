"""From a run's settings to its images, and to settings in which the data have filled every gap."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor

from vicreg_hf.data.bad_images import BadImages
from vicreg_hf.data.columns.finding import holds_images
from vicreg_hf.data.columns.spectrograms import SpectrogramColumn, SpectrogramSettings
from vicreg_hf.data.columns.texts import TextColumn
from vicreg_hf.data.memory import MEMORY_BUDGET, common_side, load_in_memory
from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.data.opening.items import ItemColumn, splits_given
from vicreg_hf.data.opening.listing import counting_left_out
from vicreg_hf.data.opening.slicing import add_parts
from vicreg_hf.data.pairs import PairedSplit
from vicreg_hf.data.sampler import GlobalBatches
from vicreg_hf.data.samples import Reductions
from vicreg_hf.data.splits import ImageSplit, held_out_split, image_split
from vicreg_hf.data.streams import ImageStream, features_of, image_stream
from vicreg_hf.runtime.checks import range_text, read_range
from vicreg_hf.runtime.distributed import agree
from vicreg_hf.runtime.machine import default_num_workers
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.building.second_branch import open_run_column, takes_waveforms

LOCAL_SHARE = 96 / 224
"""Side of a local view over that of a global one (SwAV, arXiv:2006.09882)."""


@dataclass
class TrainingData:
    """The images of a run, and the order in which they come."""

    train: ImageSplit | ImageStream
    images: ImageSplit | PairedSplit | ImageStream | Tensor
    """The images of `train` as training reads them: one by one, in pairs with another column, or
    decoded in memory."""
    held_out: ImageSplit | None
    batches: GlobalBatches
    total_steps: int
    bad: BadImages
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many files were left out when the data were opened, by the reason."""

    @property
    def pairs(self) -> PairedSplit | None:
        """The pairs, where the second branch takes another column."""
        return self.images if isinstance(self.images, PairedSplit) else None

    @property
    def sound(self) -> SpectrogramSettings | None:
        """How sounds become images, where there are no images."""
        column = self.train.column
        return column.settings if isinstance(column, SpectrogramColumn) else None

    def first_images(self, rows: list[int], reductions: Reductions | None = None) -> list[Tensor]:
        """The images of some rows; of a stream as many that can be used, or all.

        Args:
            reductions: by how much images may be reduced, as a run reduces them.
        """
        if isinstance(self.train, ImageSplit):
            return list(self.train.each_or_replaced(rows, [], reductions))
        return self.train.first(len(rows), reductions)

    def fingerprint(self) -> dict[str, Any]:
        """A description that other data do not share."""
        found = (self.pairs or self.train).fingerprint()
        return {key: value for key, value in found.items() if key != "value_range"}  # a setting


def open_training_data(
    args: PretrainingArguments,
    *,
    rank: int = 0,
    world_size: int = 1,
    local_processes: int = 1,
    main_first: Callable[[], AbstractContextManager[Any]] = nullcontext,
    default_side: int = 224,
    dataset: Any = None,
) -> tuple[PretrainingArguments, TrainingData]:
    """Find the data, and fill in the settings that follow from them.

    Args:
        rank: number of this process, from 0 to world_size - 1.
        local_processes: processes that share this machine's cores.
        main_first: a context in which the data are opened, so that one process prepares the cache.
        default_side: of views in pixels, where neither settings nor small images decide it.
        dataset: the data, where they are given in Python; None opens what dataset_name names.

    Returns:
        The settings of the run, in which no default is left open, and its data.

    Raises:
        ValueError: data that are not there, or settings that do not suit them.
        ImageError: hardly any image can be used.
    """
    with counting_left_out() as left_out:
        train, held_out, eval_split, pairs = _open_splits(args, main_first, dataset)
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
    log = Path(str(args.output_dir)) / "bad_images.jsonl"
    bad = BadImages(train.num_images, args.max_bad_fraction, log)
    images: ImageSplit | PairedSplit | ImageStream | Tensor = pairs or train
    side = None
    if isinstance(train, ImageStream):
        images = train.share(rank, world_size, seed=args.seed)
    elif (side := common_side(train)) is not None and pairs is None and not varies(train):
        loaded = load_in_memory(train, bad=bad)
        if loaded is not None:
            images = loaded
        else:
            fit = train.read_or_replace([0])[0][0].numel() * len(train) <= MEMORY_BUDGET
            if agree(fit)[0]:
                side = None  # the first images are alike, but not all
    data = TrainingData(train, images, held_out, batches, total_steps, bad, left_out)
    workers = default_num_workers(local_processes)
    filled = _filled_in(
        args, data, eval_split=eval_split, own_side=side, num_workers=workers,
        default_side=default_side,
    )  # fmt: skip
    return filled, data


def _filled_in(
    args: PretrainingArguments,
    data: TrainingData,
    *,
    eval_split: str | None,
    own_side: int | None,
    num_workers: int,
    default_side: int,
) -> PretrainingArguments:
    """The settings with a value for everything that the data and the machine decide.

    Args:
        eval_split: name of the held-out split, if there is one.
        own_side: the side of the images in pixels, if all are small, square and alike.
        num_workers: loading workers that suit the machine.
        default_side: see `open_training_data`.
    """
    limits = getattr(data.train.column, "value_range", None)
    sound, second = data.sound, data.pairs.column if data.pairs else None
    image_size = args.image_size or own_side or (sound.num_mels if sound else default_side)
    sides: dict[str, int] = {"image_size": image_size}
    if args.prime_modality in ("image", "audio") and not takes_waveforms(args):
        sides["prime_image_size"] = args.prime_image_size or image_size
    if args.num_local_views:
        local = max(8, round(image_size * LOCAL_SHARE / 8) * 8)
        sides["local_image_size"] = args.local_image_size or local
    warmup_epochs = args.warmup_epochs
    if warmup_epochs is None:
        warmup_epochs = min(10.0, data.total_steps // 10 / data.batches.steps_per_epoch)
    augmentation = "audio" if sound else "authors" if own_side is None else "cifar"
    return replace(
        args,
        image_column=data.train.column.name,
        value_range=args.value_range if limits is None else range_text(limits),
        eval_split=args.eval_split or eval_split,
        model_args=_model_args(args, sound=sound is not None),
        augmentation=args.augmentation or augmentation,
        prime_column=second.name if second else args.prime_column,
        prime_max_length=second.max_length if isinstance(second, TextColumn) else None,
        warmup_epochs=warmup_epochs,
        logging_steps=args.logging_steps or max(1, min(50, data.total_steps // 20)),
        num_workers=num_workers if args.num_workers is None else args.num_workers,
        **sides,
    )


def _model_args(args: PretrainingArguments, *, sound: bool) -> dict[str, Any] | None:
    """The timm arguments; spectrograms have one channel where these do not say it."""
    assert not isinstance(args.model_args, str)
    return {"in_chans": 1} | (args.model_args or {}) if sound else args.model_args


def _open_splits(
    args: PretrainingArguments,
    main_first: Callable[[], AbstractContextManager[Any]],
    dataset: Any = None,
) -> tuple[ImageSplit | ImageStream, ImageSplit | None, str | None, PairedSplit | None]:
    """The training split, the held-out one with its name, and the pairs of two columns."""
    with main_first():
        if dataset is None:
            config, streaming = args.dataset_config_name, args.streaming
            splits, items = open_dataset(args.dataset_name, config, streaming=streaming), None
        else:
            splits, items = splits_given(
                dataset, args.image_column, args.label_column, args.in_chans
            )
    splits = add_parts(splits, train_split=args.train_split, eval_split=args.eval_split)
    table = splits[args.train_split]
    sound = holds_sound(features_of(table, args.dataset_name), args.image_column)
    channels = (_model_args(args, sound=sound) or {}).get("in_chans", 3)
    columns: Any = {
        "dataset_name": Path(args.dataset_name).name or args.dataset_name,
        "image_column": args.image_column,
        "channels": channels,
        "value_range": read_range("value_range", args.value_range),
    }
    if sound:
        columns["sound"] = SpectrogramSettings(args.sampling_rate, args.audio_seconds)
    if args.streaming:
        return image_stream(splits, args.train_split, **columns), None, None, None
    columns |= {"label_column": args.label_column, "column": items}
    train = image_split(splits, args.train_split, **columns)
    columns["value_range"] = train.value_range
    held_out, name = held_out_split(splits, args.eval_split, args.train_split, **columns)
    if not args.is_paired:
        return train, held_out, name, None
    column = open_run_column(args, table, channels)
    return train, held_out, name, PairedSplit(train, column.prepare(table), column)


def varies(train: ImageSplit) -> bool:
    """Whether images come otherwise each time, so that none may be kept in memory."""
    return isinstance(train.column, ItemColumn) and train.column.varies


def holds_sound(features: Mapping[str, Any], column: str | None) -> bool:
    """Whether the images of a run are spectrograms of sounds."""
    if column is not None:
        return isinstance(features.get(column), datasets.Audio)
    kinds = list(features.values())
    images = any(holds_images(kind) or isinstance(kind, datasets.Array3D) for kind in kinds)
    return not images and any(isinstance(kind, datasets.Audio) for kind in kinds)


def _num_images(train: ImageSplit | ImageStream, args: PretrainingArguments) -> int:
    if train.num_images is not None:
        return train.num_images
    if args.max_steps is None:
        raise ValueError(
            f"max_steps must be given for streams of unknown length, and {train.name} does not "
            "say how many images it holds."
        )
    return args.max_steps * args.batch_size  # the images that the run reads are its epoch
