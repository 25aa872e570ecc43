"""What the protocols measure: classification, retrieval, and signs of collapse.

Shapes: N training and M test images that can be used, F features, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vicreg_hf.data.bad_images import BadImages
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.memory import SMALL_IMAGE, common_side, load_in_memory
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.evaluation.classifier import Classifier, save_classifier
from vicreg_hf.evaluation.dense.segmentation import segment
from vicreg_hf.evaluation.finetuning import finetune
from vicreg_hf.evaluation.measurements import Measurement
from vicreg_hf.evaluation.pair_embeddings import embed_pairs
from vicreg_hf.evaluation.requirements import training_rows
from vicreg_hf.evaluation.task import Task
from vicreg_hf.features.encode import check_finite_features, encode_with, encoding_precision
from vicreg_hf.metrics.collapse import collapse_report
from vicreg_hf.metrics.cross_modal import by_owner, chance, cross_recall
from vicreg_hf.metrics.knn import knn_predict
from vicreg_hf.metrics.linear_probe import linear_probe
from vicreg_hf.metrics.retrieval import average_precision_at_k, nearest_neighbours, recall_at_k
from vicreg_hf.metrics.subsets import balanced_subset
from vicreg_hf.runtime.distributed import failing_together, gather_objects
from vicreg_hf.runtime.machine import default_num_workers, local_processes
from vicreg_hf.settings.evaluation import TRAINED
from vicreg_hf.views.two_views import TwoViews

ALIGNED = 1000
"""Images of which two views are compared."""
VIEWS_AT_ONCE = 64
MOST_RANKINGS = 200
"""Resamples of mean average precision, each of which ranks all images anew."""


def _knn(task: Task) -> None:
    train, labels, test = task.x("train"), task.labels("train"), task.x("test")
    temperature = task.args.temperature
    for k in task.args.numbers("knn_k", len(train)):
        predicted = knn_predict(train, labels, test, k=k, temperature=temperature)
        settings = {"k": k, "temperature": temperature, "similarity": "cosine"}
        task.add_predictions("knn", f"{k}-NN", predicted, settings)


def _linear(task: Task) -> None:
    epochs, number = task.args.probe_epochs, task.args.labels_per_class
    x, labels, name = task.x("train"), task.labels("train"), "linear probe"
    if number is not None:
        chosen = balanced_subset(labels.cpu(), seed=task.args.seed, number=number)
        rows = torch.from_numpy(chosen).to(x.device)
        x, labels, name = x[rows], labels[rows], f"{name}, {number} labels a class"
    result = linear_probe(
        x, labels, task.x("test"), num_classes=len(task.data.names), epochs=epochs,
        seed=task.args.seed,
    )  # fmt: skip
    settings = {
        "labels_per_class": number,
        "epochs": epochs, "learning_rate": result.learning_rate,
        "weight_decay": result.weight_decay, "batch_size": result.batch_size,
    }  # fmt: skip
    tried = [
        {
            "learning_rate": rate, "weight_decay": decay, "validation_accuracy": accuracy,
            "validation_loss": loss if math.isfinite(loss) else None,
        }
        for (rate, decay), accuracy in result.validation.items()
        for loss in [result.validation_loss[rate, decay]]
    ]  # fmt: skip
    task.add_predictions("linear", name, result.predictions, settings, {"tried": tried})


def _svm(task: Task) -> None:
    from vicreg_hf.metrics.svm import COSTS, FOLDS, mean_average_precision, svm_scores

    x, targets = {}, {}
    for name in ("train", "test"):
        shown = task.part(name).targets
        assert shown is not None
        x[name] = task.features[name].x.numpy()
        targets[name] = shown[task.features[name].rows].numpy()
    seed, number = task.args.seed, len(x["test"])
    scores, costs = svm_scores(x["train"], targets["train"], x["test"], seed=seed)
    value, precisions = mean_average_precision(scores, targets["test"])
    random = np.random.default_rng(seed)
    resamples = min(task.args.num_resamples, MOST_RANKINGS)
    draws = [random.integers(number, size=number) for _ in range(resamples)]
    resampled = [mean_average_precision(scores[r], targets["test"][r])[0] for r in draws]
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    details = {
        name: {"average_precision": None if np.isnan(precision) else precision, "cost": cost}
        for name, precision, cost in zip(task.data.names, precisions, costs, strict=True)
    }
    settings = {"costs": list(COSTS), "folds": FOLDS, "resamples": resamples}
    task.measurements.append(
        Measurement(
            "svm", "linear SVM mean average precision", value, number, seed, settings,
            float(low), float(high), details=details,
        )
    )  # fmt: skip


def _retrieval(task: Task) -> None:
    train, labels, wanted = task.x("train"), task.labels("train"), task.labels("test")
    numbers = task.args.numbers("retrieval_k", len(train))
    nearest = nearest_neighbours(train, task.x("test"), max(numbers))
    relevant = labels[nearest] == wanted[:, None]
    num_relevant = labels.bincount(minlength=int(wanted.max()) + 1)[wanted]
    for k in numbers:
        voters = task.args.numbers("knn_k", len(train))
        if k == 1 and 1 in voters and "knn" in task.args.protocol_names:
            continue  # the accuracy of 1-NN is the same measure
        scores = {"recall": recall_at_k(relevant, k)}
        if k > 1:  # at 1 it is the recall
            scores["mean average precision"] = average_precision_at_k(relevant[:, :k], num_relevant)
        for name, values in scores.items():
            settings = {"similarity": "cosine", "searched": len(train), "k": k}
            task.add_scores("retrieval", f"{name} at {k}", values, settings)


def _cross_retrieval(task: Task) -> None:
    assert task.pairs is not None
    test, column = task.usable["test"], task.pairs.split.column.name
    z, z_prime, owner, left_out = embed_pairs(task.pairs, test.x, test.rows, task.device)
    if left_out > task.args.max_bad_fraction * len(test.rows):
        raise ImageError(
            f"at most max_bad_fraction={task.args.max_bad_fraction} of the pairs may be unusable, "
            f"got {left_out} of {len(test.rows)} of which column {column} cannot be used."
        )
    numbers = task.args.numbers("cross_k")
    found = cross_recall(z, z_prime, owner, numbers)
    # captions of one image are no independent samples: each image counts once
    backward = {k: by_owner(scores, owner, len(z)) for k, scores in found.backward.items()}
    directions = (
        (f"images to {column}", found.forward, len(z_prime), torch.bincount(owner)),
        (f"{column} to images", backward, len(z), torch.ones(1, dtype=torch.long)),
    )
    for name, recall, searched, num_relevant in directions:
        for k in numbers:
            settings = {
                "similarity": "cosine", "searched": searched, "k": k,
                "chance": chance(searched, num_relevant, k), "left_out": left_out,
            }  # fmt: skip
            task.add_scores("cross-retrieval", f"{name}, recall at {k}", recall[k], settings)


def _collapse(task: Task) -> None:
    x = task.usable["test"].x
    report = collapse_report(x, _features_of_two_views(task))
    curves = {"std": _rounded(report.std), "singular_values": _rounded(report.singular_values)}
    for name, value, num_images, details in (
        ("std of unit-length features", report.unit_std, len(x), {}),
        ("effective rank of features", report.effective_rank, len(x), curves),
        ("alignment of features", report.alignment, min(ALIGNED, len(x)), {}),
        ("uniformity of features", report.uniformity, len(x), {}),
        ("off-diagonal correlation of features", report.off_diagonal_correlation, len(x), {}),
    ):
        assert value is not None
        task.measurements.append(
            Measurement(
                "collapse", name, value, num_images, task.args.seed, percent=False, details=details
            )
        )


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]


def _features_of_two_views(task: Task) -> tuple[Tensor, Tensor]:
    encoder, split = task.encoder, task.data.test.split
    preset = "cifar" if encoder.image_size <= SMALL_IMAGE else "authors"
    two_views = TwoViews(
        encoder.image_size, preset if encoder.sound is None else "audio", mean=encoder.mean,
        std=encoder.std, seed=task.args.seed, in_chans=encoder.in_chans,
    )  # fmt: skip
    autocast = partial(encoding_precision, task.accelerator, task.args.bf16)
    features: tuple[list[Tensor], list[Tensor]] = ([], [])
    for rows in task.usable["test"].rows[:ALIGNED].split(VIEWS_AT_ONCE):
        crops = two_views.crop(split.read(rows.tolist()), rows.numpy())
        views = two_views.transform_crops(crops, rows.numpy())
        for found, view in zip(features, views, strict=True):
            found.append(encode_with(encoder, view, task.device, autocast))
    first, second = (check_finite_features(torch.cat(found)) for found in features)
    return first, second


def _trained(protocol: str, task: Task) -> None:
    """Train a classifier with the images, by one of `TRAINED`; every process must call this."""
    args, data, encoder = task.args, task.data, task.encoder
    settings, _ = args.training(protocol)
    assert data.train.classes is not None
    rows, workers = training_rows(protocol, args, data), args.num_workers
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
    if args.save_classifier is not None and protocol.startswith("finetune"):
        with failing_together(task.device):
            if task.accelerator.is_main_process:
                assert isinstance(result.model, Classifier)
                place = save_classifier(
                    result.model, encoder, data.names, Path(args.save_classifier)
                )
                task.accelerator.print(
                    f"The classifier is in {place}, as AutoModelForImageClassification loads it."
                )
    task.add_predictions(
        protocol, NAMES[protocol], result.predictions[task.features["test"].rows], chosen,
        {"losses": result.losses, "seconds": round(result.seconds, 1)},
    )  # fmt: skip


def _in_memory(split: ImageSplit, in_chans: int) -> ImageSplit | Tensor:
    """Small images of one size decoded, if all can be."""
    if common_side(split) is None:
        return split
    bad = BadImages(len(split), 1.0, None)
    images = load_in_memory(split, bad=bad)
    bad.agree(gather_objects, say=lambda _: None)
    return split if images is None or len(bad) or images.shape[1] != in_chans else images


NAMES = {
    "linear-sgd": "linear, authors' protocol", "finetune-1": "fine-tuning, 1 % of the labels",
    "finetune-10": "fine-tuning, 10 % of the labels", "finetune": "fine-tuning",
}  # fmt: skip
TOGETHER = (*TRAINED, "segmentation")
"""Protocols that every process takes part in; the main process measures by the others."""
RUNNERS: dict[str, Callable[[Task], None]] = {
    "knn": _knn,
    "linear": _linear,
    "svm": _svm,
    "retrieval": _retrieval,
    "cross-retrieval": _cross_retrieval,
    "collapse": _collapse,
    **{name: partial(_trained, name) for name in TRAINED},
    "segmentation": segment,
}
"""The function that measures by each of `PROTOCOLS`."""
