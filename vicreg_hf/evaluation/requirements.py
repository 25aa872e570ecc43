"""Each protocol's needs of labels and images, checked before anything is measured."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vicreg_hf.data.labelled import LabelledData
from vicreg_hf.data.sampler import GlobalBatches
from vicreg_hf.evaluation.label_lists import listed_subset, paths_of_images
from vicreg_hf.metrics.subsets import balanced_subset
from vicreg_hf.settings.evaluation import TRAINED, EvaluationArguments

NO_LABELS = ("collapse", "cross-retrieval", "segmentation")
MULTI_LABEL = ("svm",)


def require_labels(
    args: EvaluationArguments, data: LabelledData, *, num_processes: int = 1
) -> None:
    """Refuse labels that do not suffice for a protocol, and batches that processes cannot share.

    Raises:
        ValueError: says which protocol needs what.
    """
    train, test = data.train, data.test
    for protocol in args.protocol_names:
        if protocol in NO_LABELS:
            continue
        if train.classes is None and train.targets is None:
            raise ValueError(
                f"protocol {protocol} needs labels in both splits, and {train.split.name} or "
                f"{test.split.name} has none; name their column with --label_column, or choose of "
                f"{', '.join(NO_LABELS)}."
            )
        if (protocol in MULTI_LABEL) != (train.targets is not None):
            kinds = {True: "lists of classes", False: "one class an image"}
            raise ValueError(
                f"protocol {protocol} needs {kinds[protocol in MULTI_LABEL]}, and "
                f"{train.split.name} has {kinds[train.targets is not None]}; choose another "
                "--protocols or --label_column."
            )
        if train.classes is None:
            _require_targets(data)
            continue
        shown = train.classes[train.classes >= 0].unique().tolist()
        if len(shown) < 2:
            raise ValueError(
                f"protocol {protocol} needs at least two classes, and {train.split.name} shows "
                f"only {data.names[shown[0]] if data.names else 'one'}."
            )
        if protocol in TRAINED:
            rows = training_rows(protocol, args, data)
            number = len(train.split) if rows is None else len(rows)
            settings, _ = args.training(protocol)
            batch_size = min(settings.batch_size, number // num_processes * num_processes)
            _ = GlobalBatches(number, batch_size, seed=args.seed, world_size=num_processes)
    require_neighbours(args, len(train.split), train.split.name)


def require_neighbours(args: EvaluationArguments, num_images: int, name: str) -> None:
    """Refuse to look for more neighbours than there are training images, in a split of that name.

    Raises:
        ValueError: says which setting is too large.
    """
    for protocol, setting in (("knn", "knn_k"), ("retrieval", "retrieval_k")):
        most = max(args.numbers(setting, num_images))
        if protocol in args.protocol_names and num_images < most:
            raise ValueError(
                f"{setting} must be at most the number of training images, got {most} and "
                f"{num_images} images of {name}; give smaller --{setting}."
            )


def _require_targets(data: LabelledData) -> None:
    from vicreg_hf.metrics.svm import FOLDS

    assert data.train.targets is not None
    assert data.test.targets is not None
    name, number = data.train.split.name, len(data.train.split)
    for label, shown in zip(data.names, data.train.targets.sum(0).tolist(), strict=True):
        if min(shown, number - shown) < FOLDS:
            raise ValueError(
                f"protocol svm needs at least {FOLDS} training images that show a class and "
                f"{FOLDS} that do not, and {shown} of {number} in {name} show {label}; leave it "
                "out."
            )
    if not data.test.targets.any():
        raise ValueError(
            f"protocol svm needs images of some class, and {data.test.split.name} shows none."
        )


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
