"""The labelled data set that a run is measured on, where it is another than the one trained on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.data.opening.slicing import add_parts
from vicreg_hf.data.splits import ImageSplit, held_out_split, image_split
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.building.data import TrainingData
from vicreg_hf.training.monitoring.knn import missing_for_knn

OWN_SETTINGS = (
    "dataset_name", "dataset_config_name", "train_split", "eval_split", "image_column",
    "label_column",
)  # fmt: skip
"""Settings that the monitor's data have too, under names that begin with `monitor_`."""


@dataclass
class MonitorData:
    """Labelled images that are not trained on."""

    train: ImageSplit
    """The neighbours."""
    held_out: ImageSplit | None
    """The queries; None where the data have one split, for leave-one-out."""


def open_monitor_data(
    args: PretrainingArguments,
    data: TrainingData,
    main_first: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[PretrainingArguments, MonitorData | None]:
    """Open the data set of `monitor_dataset_name`, if there is one.

    Args:
        data: of the run, whose images decide on channels and on how sounds are seen.
        main_first: a context in which the data are opened, so that one process prepares the cache.

    Returns:
        The settings with the names of its splits and columns, and its images.

    Raises:
        ValueError: it is not there, or has no images with classes such as the run takes.
    """
    name = args.monitor_dataset_name
    if name is None:
        return args, None
    with _errors_name_monitor_settings(name):
        with main_first():
            splits = open_dataset(name, args.monitor_dataset_config_name)
        given = args.monitor_train_split
        train_split = given or (
            "train" if "train" in splits or len(splits) > 1 else next(iter(splits))
        )
        splits = add_parts(splits, train_split=train_split, eval_split=args.monitor_eval_split)
        columns: dict[str, Any] = {
            "dataset_name": Path(name).name or name, "image_column": args.monitor_image_column,
            "label_column": args.monitor_label_column, "channels": data.train.column.channels,
            "sound": data.sound,
        }  # fmt: skip
        train = image_split(splits, train_split, **columns)
        columns |= {"image_column": train.column.name, "value_range": train.value_range}
        held_out, eval_split = held_out_split(
            splits, args.monitor_eval_split, train_split, **columns
        )
        _check(train, held_out, data)
    filled = replace(
        args, monitor_train_split=train_split, monitor_eval_split=eval_split,
        monitor_image_column=train.column.name,
    )  # fmt: skip
    return filled, MonitorData(train, held_out)


def _check(train: ImageSplit, held_out: ImageSplit | None, data: TrainingData) -> None:
    if type(train.column) is not type(data.train.column):
        raise ValueError(
            f"image_column must hold what the run trains on, got {train.column.name!r} of "
            f"{train.name} for {data.train.column.name!r} of {data.train.name}."
        )
    if (missing := missing_for_knn(train, held_out)) is not None:
        raise ValueError(f"kNN needs labels, but {missing}.")


@contextmanager
def _errors_name_monitor_settings(name: str) -> Iterator[None]:
    """Let errors say that they are of the monitor's data, and name its settings."""
    try:
        yield
    except ValueError as error:
        words = re.sub(rf"\b({'|'.join(OWN_SETTINGS)})\b", r"monitor_\1", str(error))
        raise ValueError(
            f"monitor_dataset_name must name images with classes, got {name}: {words}"
        ) from error
