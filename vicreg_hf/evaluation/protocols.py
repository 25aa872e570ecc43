"""The protocols of an evaluation: from features, or images, and labels to measurements.

Shapes: N training and M test images that can be used, F features, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from vicreg_hf.data.bad_images import BadImages
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.labelled import LabelledData
from vicreg_hf.data.memory import SMALL_IMAGE, common_side, load_in_memory
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.evaluation.finetuning import finetune
from vicreg_hf.evaluation.label_lists import listed_subset, paths_of_images
from vicreg_hf.evaluation.measurements import Measurement
from vicreg_hf.evaluation.pair_embeddings import Pairs, embed_pairs
from vicreg_hf.features.cache import Features
from vicreg_hf.features.encoders import Encoder
from vicreg_hf.metrics.collapse import collapse_report
from vicreg_hf.metrics.cross_modal import by_owner, chance, cross_recall
from vicreg_hf.metrics.intervals import bootstrap_interval
from vicreg_hf.metrics.knn import knn_predict
from vicreg_hf.metrics.linear_probe import linear_probe
from vicreg_hf.metrics.retrieval import average_precision_at_k, nearest_neighbours, recall_at_k
from vicreg_hf.metrics.subsets import balanced_subset
from vicreg_hf.runtime.machine import default_num_workers, local_processes
from vicreg_hf.settings.evaluation import TRAINED, EvaluationArguments
from vicreg_hf.views.two_views import TwoViews

NO_LABELS = ("collapse", "cross-retrieval")
MULTI_LABEL = ("svm",)
ALIGNED = 1000
"""Images of which two views are compared."""
VIEWS_AT_ONCE = 64
MOST_RANKINGS = 200
"""Resamples of mean average precision, each of which ranks all images anew."""


@dataclass(frozen=True)
class Task:
    """What a protocol works on."""

    args: EvaluationArguments
    accelerator: Accelerator
    encoder: Encoder
    data: LabelledData
    features: Mapping[str, Features]
    pairs: Pairs | None = None
    """Both branches and the test pairs, for cross-retrieval."""

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def x(self, part: str) -> Tensor:
        """(N, F) of "train" or (M, F) of "test", on the device."""
        return self.features[part].x.to(self.device)

    def labels(self, part: str) -> Tensor:
        """(N,) or (M,) classes of the images that can be used, on the device."""
        labelled = self.data.train if part == "train" else self.data.test
        assert labelled.classes is not None
        return labelled.classes[self.features[part].rows].to(self.device)

    def measured(
        self,
        protocol: str,
        name: str,
        scores: Tensor,
        settings: Mapping[str, Any],
        details: Mapping[str, Any] | None = None,
    ) -> Measurement:
        """The mean of a score for each test image, with its interval."""
        values = scores.cpu().double().numpy()
        args = self.args
        low, high = bootstrap_interval(values, seed=args.seed, resamples=args.num_resamples)
        return Measurement(
            protocol, name, float(values.mean()), len(values), args.seed, dict(settings), low, high,
            details=dict(details or {}),
        )  # fmt: skip


@dataclass
class Measured:
    """What a protocol has found."""

    measurements: list[Measurement] = field(default_factory=list)
    predictions: dict[str, Tensor] = field(default_factory=dict)
    """(M,) classes on the CPU, by the name of the classifier."""

    def classified(
        self,
        task: Task,
        protocol: str,
        name: str,
        found: Tensor,
        settings: Mapping[str, Any],
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a classifier's top-1 accuracy."""
        right = found.to(task.device) == task.labels("test")
        self.predictions[name] = found.cpu()
        self.measurements.append(
            task.measured(protocol, f"{name} top-1 accuracy", right, settings, details)
        )


def run_protocol(name: str, task: Task) -> Measured:
    """Measure by one of `PROTOCOLS`; of `TRAINED` ones every process must call this."""
    measured = Measured()
    (_trained if name in TRAINED else RUNNERS[name])(name, task, measured)
    return measured


def _knn(protocol: str, task: Task, measured: Measured) -> None:
    args = task.args
    for k in args.numbers("knn_k", len(task.x("train"))):
        found = knn_predict(
            task.x("train"), task.labels("train"), task.x("test"), k=k,
            temperature=args.temperature,
        )  # fmt: skip
        settings = {"k": k, "temperature": args.temperature, "similarity": "cosine"}
        measured.classified(task, protocol, f"{k}-NN", found, settings)


def _linear(protocol: str, task: Task, measured: Measured) -> None:
    args = task.args
    result = linear_probe(
        task.x("train"), task.labels("train"), task.x("test"), num_classes=len(task.data.names),
        epochs=args.probe_epochs, seed=args.seed,
    )  # fmt: skip
    settings = {
        "epochs": args.probe_epochs, "learning_rate": result.learning_rate,
        "weight_decay": result.weight_decay, "batch_size": result.batch_size,
    }  # fmt: skip
    tried = []
    for (rate, decay), accuracy in result.validation.items():
        loss = result.validation_loss[rate, decay]
        tried.append(
            {
                "learning_rate": rate, "weight_decay": decay, "validation_accuracy": accuracy,
                "validation_loss": loss if math.isfinite(loss) else None,
            }
        )  # fmt: skip
    measured.classified(
        task, protocol, "linear probe", result.predictions, settings, {"tried": tried}
    )


TRAINED_NAMES = {
    "linear-sgd": "linear, authors' protocol", "finetune-1": "fine-tuning, 1 % of the labels",
    "finetune-10": "fine-tuning, 10 % of the labels", "finetune": "fine-tuning",
}  # fmt: skip


def _trained(protocol: str, task: Task, measured: Measured) -> None:
    args, data, encoder = task.args, task.data, task.encoder
    settings, _ = args.training(protocol)
    assert data.train.classes is not None
    rows = training_rows(protocol, args, data)
    workers = args.num_workers
    if workers is None:
        workers = default_num_workers(local_processes(task.accelerator))
    result = finetune(
        encoder.module, _in_memory(data.train.split, encoder), data.train.classes,
        _in_memory(data.test.split, encoder), num_classes=len(data.names),
        num_features=encoder.num_features, image_size=encoder.image_size,
        crop_pct=encoder.data_config["crop_pct"], mean=encoder.mean, std=encoder.std,
        settings=settings, accelerator=task.accelerator, rows=rows, num_workers=workers,
        in_chans=encoder.in_chans, bf16=args.bf16,
    )  # fmt: skip
    found = result.predictions[task.features["test"].rows]
    number = len(data.train.split) if rows is None else len(rows)
    given = {name: value for name, value in asdict(settings).items() if name != "seed"}
    given |= {"batch_size": result.batch_size, "training_images": number}
    details = {"losses": result.losses, "seconds": round(result.seconds, 1)}
    measured.classified(task, protocol, TRAINED_NAMES[protocol], found, given, details)


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


def _in_memory(split: ImageSplit, encoder: Encoder) -> ImageSplit | Tensor:
    """Small images of one size decoded, if all can be."""
    side = common_side(split)
    if side is None or side > SMALL_IMAGE:
        return split
    bad = BadImages(len(split), 1.0, None)
    images = load_in_memory(split, bad=bad)
    bad.agree(say=lambda _: None)
    return split if images is None or len(bad) or images.shape[1] != encoder.in_chans else images


def _svm(protocol: str, task: Task, measured: Measured) -> None:
    from vicreg_hf.metrics.svm import COSTS, FOLDS, mean_average_precision, svm_scores

    args, data = task.args, task.data
    targets = []
    for labelled, part in ((data.train, "train"), (data.test, "test")):
        assert labelled.targets is not None
        targets.append(labelled.targets[task.features[part].rows].numpy())
    train, test = (task.features[part].x.numpy() for part in ("train", "test"))
    scores, costs = svm_scores(train, targets[0], test, seed=args.seed)
    value, each = mean_average_precision(scores, targets[1])
    random = np.random.default_rng(args.seed)
    resampled = []
    resamples = min(args.num_resamples, MOST_RANKINGS)
    for _ in range(resamples):
        rows = random.integers(len(test), size=len(test))
        resampled.append(mean_average_precision(scores[rows], targets[1][rows])[0])
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    details = {
        name: {"average_precision": None if np.isnan(own) else own, "cost": cost}
        for name, own, cost in zip(data.names, each, costs, strict=True)
    }
    settings = {"costs": list(COSTS), "folds": FOLDS, "resamples": resamples}
    measured.measurements.append(
        Measurement(
            protocol, "linear SVM mean average precision", value, len(test), args.seed, settings,
            float(low), float(high), details=details,
        )
    )  # fmt: skip


def _retrieval(protocol: str, task: Task, measured: Measured) -> None:
    train, labels, wanted = task.x("train"), task.labels("train"), task.labels("test")
    numbers = task.args.numbers("retrieval_k", len(train))
    nearest = nearest_neighbours(train, task.x("test"), max(numbers))
    relevant = labels[nearest] == wanted[:, None]
    how_many = labels.bincount(minlength=int(wanted.max()) + 1)[wanted]
    settings = {"similarity": "cosine", "searched": len(train)}
    for k in numbers:
        of = settings | {"k": k}
        measured.measurements += [
            task.measured(protocol, f"recall at {k}", recall_at_k(relevant, k), of),
            task.measured(protocol, f"mean average precision at {k}",
                          average_precision_at_k(relevant[:, :k], how_many), of),
        ]  # fmt: skip


def _cross_retrieval(protocol: str, task: Task, measured: Measured) -> None:
    assert task.pairs is not None
    test, column = task.features["test"], task.pairs.split.column.name
    z, z_prime, owner, left_out = embed_pairs(task.pairs, test.x, test.rows, task.device)
    if left_out > task.args.max_bad_fraction * len(test.rows):
        raise ImageError(
            f"at most max_bad_fraction={task.args.max_bad_fraction} of the pairs may be unusable, "
            f"got {left_out} of {len(test.rows)} of which column {column} cannot be used."
        )
    each = torch.bincount(owner)
    numbers = task.args.numbers("cross_k")
    found = cross_recall(z, z_prime, owner, numbers)
    # captions of one image are no independent samples: each image counts once
    backward = {k: by_owner(scores, owner, len(z)) for k, scores in found.backward.items()}
    directions = (
        (f"images to {column}", found.forward, len(z_prime), each),
        (f"{column} to images", backward, len(z), torch.ones(1, dtype=torch.long)),
    )
    for name, recall, candidates, right in directions:
        for k in numbers:
            settings = {
                "similarity": "cosine", "searched": candidates, "k": k,
                "chance": chance(candidates, right, k), "left_out": left_out,
            }  # fmt: skip
            measured.measurements.append(
                task.measured(protocol, f"{name}, recall at {k}", recall[k], settings)
            )


def _collapse(protocol: str, task: Task, measured: Measured) -> None:
    args, features = task.args, task.features["test"]
    report = collapse_report(features.x, _two_views(task))
    found = {
        "embedding std": report.unit_std, "effective rank": report.effective_rank,
        "alignment": report.alignment, "uniformity": report.uniformity,
        "off-diagonal correlation": report.off_diagonal_correlation,
    }  # fmt: skip
    curves = {"std": _rounded(report.std), "singular_values": _rounded(report.singular_values)}
    for name, value in found.items():
        if value is not None:
            number = min(ALIGNED, len(features.x)) if name == "alignment" else len(features.x)
            measured.measurements.append(
                Measurement(
                    protocol, name, value, number, args.seed, percent=False,
                    details=curves if name == "effective rank" else {},
                )
            )  # fmt: skip


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]


def _two_views(task: Task) -> tuple[Tensor, Tensor]:
    """Features of two random views of some test images."""
    encoder, split = task.encoder, task.data.test.split
    rows = task.features["test"].rows[:ALIGNED].numpy()
    preset = "cifar" if encoder.image_size <= SMALL_IMAGE else "authors"
    preset = preset if encoder.sound is None else "audio"
    make = TwoViews(
        encoder.image_size, preset, mean=encoder.mean, std=encoder.std, seed=task.args.seed,
        in_chans=encoder.in_chans,
    )  # fmt: skip
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start in range(0, len(rows), VIEWS_AT_ONCE):
        own = rows[start : start + VIEWS_AT_ONCE]
        crops = make.crop(split.read(own.tolist()), own)
        halved = torch.autocast(task.device.type, torch.bfloat16, enabled=task.args.bf16)
        with torch.inference_mode(), halved, task.accelerator.autocast():
            for part, view in zip(parts, make.transform_crops(crops, own), strict=True):
                part.append(encoder.module(view.to(task.device)).float())
    return torch.cat(parts[0]), torch.cat(parts[1])


RUNNERS: dict[str, Callable[[str, Task, Measured], None]] = {
    "knn": _knn,
    "linear": _linear,
    "svm": _svm,
    "retrieval": _retrieval,
    "cross-retrieval": _cross_retrieval,
    "collapse": _collapse,
}
