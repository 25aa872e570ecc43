"""The protocols that train a classifier with the images, on all labels or a part of them."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vicreg_hf.data.bad_images import BadImages
from vicreg_hf.data.labelled import LabelledData
from vicreg_hf.data.memory import SMALL_IMAGE, common_side, load_in_memory
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.evaluation.finetuning import finetune
from vicreg_hf.evaluation.label_lists import listed_subset, paths_of_images
from vicreg_hf.evaluation.task import Task
from vicreg_hf.metrics.subsets import balanced_subset
from vicreg_hf.runtime.machine import default_num_workers, local_processes
from vicreg_hf.settings.evaluation import EvaluationArguments

NAMES = {
    "linear-sgd": "linear, authors' protocol", "finetune-1": "fine-tuning, 1 % of the labels",
    "finetune-10": "fine-tuning, 10 % of the labels", "finetune": "fine-tuning",
}  # fmt: skip


def measure_trained(protocol: str, task: Task) -> None:
    """Train a classifier by one of `TRAINED`; every process must call this."""
    args, data, encoder = task.args, task.data, task.encoder
    settings, _ = args.training(protocol)
    assert data.train.classes is not None
    rows = training_rows(protocol, args, data)
    workers = args.num_workers
    if workers is None:
        workers = default_num_workers(local_processes(task.accelerator))
    train, test = (_in_memory(part.split, encoder.in_chans) for part in (data.train, data.test))
    result = finetune(
        encoder.module, train, data.train.classes, test, num_classes=len(data.names),
        num_features=encoder.num_features, image_size=encoder.image_size,
        crop_pct=encoder.data_config["crop_pct"], mean=encoder.mean, std=encoder.std,
        settings=settings, accelerator=task.accelerator, rows=rows, num_workers=workers,
        in_chans=encoder.in_chans, bf16=args.bf16,
    )  # fmt: skip
    chosen = {name: value for name, value in asdict(settings).items() if name != "seed"} | {
        "batch_size": result.batch_size, "training_images": len(train if rows is None else rows),
    }  # fmt: skip
    task.add_predictions(
        protocol, NAMES[protocol], result.predictions[task.features["test"].rows], chosen,
        {"losses": result.losses, "seconds": round(result.seconds, 1)},
    )  # fmt: skip


def training_rows(
    protocol: str, args: EvaluationArguments, data: LabelledData
) -> NDArray[np.int64] | None:
    """Numbers of the training images that one of `TRAINED` learns from; None is all.

    Raises:
        ValueError: a list that names what is not there.
    """
    (_, fraction), train = args.training(protocol), data.train
    assert train.classes is not None
    labelled = np.flatnonzero(train.classes.numpy() >= 0)
    if protocol == "finetune" and args.label_list is not None:
        listed = listed_subset(args.label_list, paths_of_images(train.split), len(train.split))
        if len(unknown := np.setdiff1d(listed, labelled)):
            raise ValueError(
                f"label_list must name images that have a class, and {len(unknown)} have none; the "
                f"first is {train.split.place(int(unknown[0]))}."
            )
        return listed
    if fraction == 1:
        return None if len(labelled) == len(train.classes) else labelled
    return labelled[balanced_subset(train.classes[labelled], fraction, args.seed)]


def _in_memory(split: ImageSplit, in_chans: int) -> ImageSplit | Tensor:
    """Small images of one size decoded, if all can be."""
    side = common_side(split)
    if side is None or side > SMALL_IMAGE:
        return split
    bad = BadImages(len(split), 1.0, None)
    images = load_in_memory(split, bad=bad)
    bad.agree(say=lambda _: None)
    return split if images is None or len(bad) or images.shape[1] != in_chans else images
