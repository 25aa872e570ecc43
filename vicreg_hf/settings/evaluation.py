"""Every setting of an evaluation, and how the command line and recipes fill them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from vicreg_hf.runtime.checks import settle_kinds
from vicreg_hf.settings.finetuning import LINEAR, ONE_PERCENT, TEN_PERCENT, FinetuneSettings

TRAINED: dict[str, tuple[FinetuneSettings, float]] = {
    "linear-sgd": (LINEAR, 1.0),
    "finetune-1": (ONE_PERCENT, 0.01),
    "finetune-10": (TEN_PERCENT, 0.1),
    "finetune": (TEN_PERCENT, 1.0),
}
"""Protocols that train with the images: how, and on which part of the labels."""
PROTOCOLS = ("knn", "linear", *TRAINED, "svm", "retrieval", "cross-retrieval", "collapse")


def _setting(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


USUAL_NEIGHBOURS = {"knn_k": [20, 200], "retrieval_k": [1, 5, 10, 100]}


@dataclass
class EvaluationArguments:
    """Settings of `evaluate`."""

    model: str = field(
        metadata={"help": "Encoder on the Hub, output_dir of a run, or directory of an encoder."}
    )
    dataset_name: str = field(metadata={"help": "As for pretrain.py: Hub id, folder or file."})
    protocols: str = _setting("knn,linear", f"Of {', '.join(PROTOCOLS)}, joined by commas.")
    output_dir: str | None = _setting(
        None, "Where results.json and report.html go; by default evaluations/MODEL-on-DATA."
    )
    revision: str | None = _setting(None, "Branch or commit of a model on the Hub.")
    dataset_config_name: str | None = _setting(None, "Configuration of a Hub data set.")
    train_split: str = _setting("train", "Split to learn from, or part such as train[:90%%].")
    eval_split: str | None = _setting(
        None, "Split to measure on; by default test or validation, if there."
    )
    image_column: str | None = _setting(None, "Column of images; found by its type if only one.")
    label_column: str | None = _setting(
        None, "Column of classes, or of lists of classes; by default the only one, or label."
    )
    seed: int = _setting(0, "Of subsets, classifiers, crops and resampling.")
    knn_k: str | None = _setting(
        None, "Neighbours of knn, joined by commas; by default 20,200, or what a small split has."
    )
    temperature: float = _setting(0.07, "Of the votes of knn; smaller trusts the nearest more.")
    retrieval_k: str | None = _setting(
        None, "Neighbours of retrieval; by default 1,5,10,100, or what a small split has."
    )
    cross_k: str = _setting("1,5,10", "Neighbours of cross-retrieval, joined by commas.")
    prime_column: str | None = _setting(
        None, "Column of what the second branch takes; found by its type if only one."
    )
    prime_tokenizer: str | None = _setting(
        None, "Of a second branch that takes text; by default the one published with it."
    )
    probe_epochs: int = _setting(30, "Passes of linear over the features.")
    epochs: int | None = _setting(None, "Of linear-sgd and finetune; by default the authors'.")
    train_batch_size: int | None = _setting(
        None, "Images per step of linear-sgd and finetune over all processes."
    )
    lr_head: float | None = _setting(None, "Of the classifier; by default the authors'.")
    lr_backbone: float | None = _setting(None, "Of the encoder when fine-tuned; likewise.")
    weight_decay: float | None = _setting(None, "Of linear-sgd and finetune; likewise.")
    crop_scale: float | None = _setting(
        None, "Least area of the random crops of linear-sgd and finetune; by default 0.08."
    )
    label_fraction: float | None = _setting(
        None, "Part of each class that finetune learns from, chosen by the seed; by default all."
    )
    label_list: str | None = _setting(
        None, "File of image names or row numbers, one a line, that finetune learns from."
    )
    batch_size: int = _setting(256, "Images encoded at once in each process.")
    bf16: bool = _setting(False, "Encode in bfloat16.")
    num_workers: int | None = _setting(None, "Image-decoding workers per process.")
    max_bad_fraction: float = _setting(0.05, "Share of images that may be unusable; left out.")
    num_resamples: int = _setting(
        1000, "Of the test images, for intervals of 95 percent; of svm at most 200."
    )
    cache_dir: str = _setting(
        str(Path(HF_HOME) / "vicreg_hf" / "features"), "Where features are kept; may be deleted."
    )
    update_card: bool = _setting(True, "Add the results to the card of a model in a directory.")

    def __post_init__(self) -> None:
        settle_kinds(self)
        unknown = [name for name in self.protocol_names if name not in PROTOCOLS]
        if unknown or not self.protocol_names:
            raise ValueError(
                f"protocols must be of {', '.join(PROTOCOLS)}, joined by commas, got "
                f"{', '.join(unknown) or 'none'}."
            )
        for name in ("knn_k", "retrieval_k", "cross_k"):
            _ = self.numbers(name)
        for name in ("temperature", "batch_size", "probe_epochs", "num_resamples", "epochs",
                     "train_batch_size", "lr_head"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}.")
        for name in ("label_fraction", "crop_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must lie above 0 and at most at 1, got {value}.")
        if self.label_fraction is not None and self.label_list is not None:
            raise ValueError("label_fraction and label_list exclude each other, got both.")
        subset = self.label_fraction is not None or self.label_list is not None
        if subset and "finetune" not in self.protocol_names:
            raise ValueError(
                "label_fraction and label_list are settings of the protocol finetune, got "
                f"protocols={self.protocols}; finetune-1 and finetune-10 have their own."
            )
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(
                f"max_bad_fraction must lie between 0 and 1, got {self.max_bad_fraction}."
            )
        if not 0 <= self.seed < 2**32:  # as scikit-learn wants it
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}.")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers must be a number from 0, got {self.num_workers}.")
        for protocol in self.protocol_names:
            if protocol in TRAINED:
                _ = self.training(protocol)
        if self.output_dir is None:
            names = [Path(name).resolve() if Path(name).exists() else Path(name)
                     for name in (self.model, self.dataset_name)]  # fmt: skip
            model, data = names
            # the encoder of a run is known by the run
            name = model.parent.name if model.name == "encoder" else model.name
            self.output_dir = f"evaluations/{name}-on-{data.name}"

    @property
    def protocol_names(self) -> list[str]:
        """Each once, in the order given."""
        given = [name.strip() for name in self.protocols.split(",")]
        return list(dict.fromkeys(name for name in given if name))

    def numbers(self, name: str, most: int | None = None) -> list[int]:
        """A setting of whole numbers joined by commas.

        Args:
            most: what those of a default may be; by default anything.
        """
        given = getattr(self, name)
        if given is None:
            usual = USUAL_NEIGHBOURS[name]
            return usual if most is None else [k for k in usual if k <= most] or [most]
        try:
            found = [int(number) for number in str(given).split(",")]
        except ValueError:
            found = []
        if not found or min(found) < 1:
            raise ValueError(
                f"{name} must be positive whole numbers joined by commas, got {given!r}."
            )
        return sorted(set(found))

    def training(self, protocol: str) -> tuple[FinetuneSettings, float]:
        """How one of `TRAINED` trains, and on which part of the labels."""
        settings, fraction = TRAINED[protocol]
        given: dict[str, Any] = {
            "epochs": self.epochs, "batch_size": self.train_batch_size, "lr_head": self.lr_head,
            "weight_decay": self.weight_decay, "seed": self.seed,
        }  # fmt: skip
        if not settings.frozen:
            given["lr_backbone"] = self.lr_backbone
        if protocol == "finetune":
            fraction = self.label_fraction or 1.0
        if self.crop_scale is not None:
            given["scale"] = (self.crop_scale, 1.0)
        changed: Any = {name: value for name, value in given.items() if value is not None}
        return replace(settings, **changed), fraction
