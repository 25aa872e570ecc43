"""Every setting of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from huggingface_hub.constants import HF_HOME

from vicreg_hf.settings.base import Count, Limit, NotNegative, Positive, PositiveShare
from vicreg_hf.settings.extraction import EncodingSettings
from vicreg_hf.settings.finetuning import LINEAR, ONE_PERCENT, TEN_PERCENT, FinetuneSettings

TRAINED: dict[str, tuple[FinetuneSettings, float]] = {
    "linear-sgd": (LINEAR, 1.0),
    "finetune-1": (ONE_PERCENT, 0.01),
    "finetune-10": (TEN_PERCENT, 0.1),
    "finetune": (TEN_PERCENT, 1.0),
}
"""Protocols that train with the images: how, and on which fraction of the labels."""
PROTOCOLS = (
    "knn", "linear", *TRAINED, "svm", "retrieval", "cross-retrieval", "segmentation", "collapse",
)  # fmt: skip
OF_SEGMENTATION = ("image_size", "mask_column", "mask_dir", "mask_names", "save_masks")
"""Settings that say nothing without the protocol segmentation."""
NO_VOID, USUAL_VOID = "none", "255"
USUAL_NEIGHBOURS = {"knn_k": [20, 200], "retrieval_k": [1, 5, 10, 100]}
"""Numbers of neighbours where none are given, by setting."""


@dataclass(frozen=True)
class EvaluationArguments(EncodingSettings):
    """Settings of `evaluate`."""

    command: ClassVar[str] = "vicreg-hf evaluate"
    recipe_folder: ClassVar[str] = "evaluation"
    usual: ClassVar[tuple[str, ...]] = (
        "model", "dataset_name", "protocols", "output_dir", "train_split", "eval_split",
        "label_column", "batch_size", "bf16",
    )  # fmt: skip
    headings: ClassVar[dict[str, str]] = EncodingSettings.headings | {
        "protocols": "what is measured", "knn_k": "protocols on features",
        "image_size": "segmentation", "epochs": "training a classifier with the images",
        "num_resamples": "results",
    }  # fmt: skip

    several: ClassVar[tuple[str, ...]] = ("model",)

    model: str
    """Encoder on the Hub, output_dir of a run, or directory of an encoder; several are compared on
    the same images."""
    protocols: str = "knn,linear"
    """Protocols to measure by, joined by commas: any of knn, linear, linear-sgd, finetune-1,
    finetune-10, finetune, svm, retrieval, cross-retrieval, segmentation, collapse."""
    output_dir: str | None = None
    """Directory of results.json and report.html; by default evaluations/MODEL-on-DATA."""
    train_split: str = "train"
    """Split to learn from, or part such as train[:90%]."""
    eval_split: str | None = None
    """Split to measure on; by default test or validation, if the data have one."""
    label_column: str | None = None
    """Column of classes, or of lists of them; by default the only one, or label."""
    seed: Annotated[int, Limit("between 0 and 2**32 - 1", lambda n: 0 <= n < 2**32)] = 0
    """Seed of subsets, classifiers, crops and resampling."""
    knn_k: str | None = None
    """Neighbours that vote in knn, joined by commas; by default 20,200, or what a small split
    has."""
    temperature: Positive = 0.07
    """Temperature of the votes of knn; a smaller one trusts the nearest more."""
    retrieval_k: str | None = None
    """Neighbours of retrieval, joined by commas; by default 1,5,10,100, or what a small split
    has."""
    cross_k: str = "1,5,10"
    """Neighbours of cross-retrieval, joined by commas."""
    prime_column: str | None = None
    """Column that the second branch takes; by default the only one of its type."""
    prime_tokenizer: str | None = None
    """Tokenizer of a second branch that takes text; by default the one published with it."""
    baselines: bool | None = None
    """Also measure raw pixels and the untrained encoder by knn; by default where that is quick, and
    otherwise as the encoder's run has measured them."""
    probe_epochs: Count = 30
    """Passes of linear over the features."""
    labels_per_class: Count | None = None
    """Labels of each class that linear learns from, chosen by seed; by default all."""
    image_size: str | None = None
    """Pixels to which segmentation resizes whole images, as 480, or as 360x480 for height x width;
    by default the encoder's own size. A larger one gives a finer feature map."""
    mask_column: str | None = None
    """Column of masks, images whose pixels are numbers of classes; by default the only one."""
    mask_dir: str | None = None
    """Folder of masks, instead of a column: they have the names of the images, in the same folders,
    but for the ending."""
    mask_names: str | None = None
    """Names of the masks' classes: a text file with one in each line from number 0 on, a JSON file
    such as id2label.json, or a column of the data that declares classes."""
    save_masks: str | None = None
    """Directory for what segmentation predicts: a PNG of class numbers for each test image, called
    after its row."""
    ignore_index: str = USUAL_VOID
    """Numbers in masks that are no class and count for nothing, joined by commas, beside 255; none
    makes 255 a class too."""
    epochs: Count | None = None
    """Epochs of linear-sgd and finetune, by default the authors' number, and of segmentation, by
    default 50."""
    train_batch_size: Count | None = None
    """Images per step of linear-sgd and finetune over all processes, and of segmentation, by
    default 16."""
    lr_head: Positive | None = None
    """Learning rate of the classifier; by default the authors', and of segmentation the best of
    some on a tenth of the training images."""
    lr_backbone: NotNegative | None = None
    """Learning rate of the encoder in finetune; by default the authors' rate."""
    weight_decay: NotNegative | None = None
    """Weight decay of linear-sgd and finetune, by default the authors', and of segmentation, by
    default 1e-4."""
    crop_scale: PositiveShare | None = None
    """Least area of the random crops of linear-sgd and finetune, as a fraction; by default 0.08."""
    label_fraction: PositiveShare | None = None
    """Fraction of each class that finetune learns from, chosen by seed; by default all."""
    label_list: str | None = None
    """File with an image name or row number in each line, from which finetune learns."""
    save_classifier: str | None = None
    """Directory for the classifier that finetune, finetune-1 or finetune-10 trains, which stock
    AutoModelForImageClassification and timm load with its class names."""
    num_resamples: Count = 1000
    """Resamples of the test images for intervals of differences; for svm at most 200."""
    cache_dir: str = str(Path(HF_HOME) / "vicreg_hf" / "features")
    """Directory of features; it may be deleted."""
    update_card: bool = True
    """Add the results to the model card, where the model is a directory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.protocol_names if name not in PROTOCOLS]
        if unknown or not self.protocol_names:
            raise ValueError(
                f"protocols must be of {', '.join(PROTOCOLS)}, joined by commas, got "
                f"{', '.join(unknown) or 'none'}."
            )
        for name in ("knn_k", "retrieval_k", "cross_k"):
            _ = self.numbers(name)
        if self.label_fraction is not None and self.label_list is not None:
            raise ValueError("label_fraction and label_list exclude each other, got both.")
        if self.labels_per_class is not None and "linear" not in self.protocol_names:
            raise ValueError(
                "labels_per_class is a setting of the protocol linear, got "
                f"protocols={self.protocols}; add linear, or leave it out."
            )
        given = [name for name in OF_SEGMENTATION if getattr(self, name) is not None]
        given += ["ignore_index"] if self.ignore_index != USUAL_VOID else []
        if given and "segmentation" not in self.protocol_names:
            raise ValueError(
                f"{given[0]} is a setting of the protocol segmentation, got "
                f"protocols={self.protocols}; add segmentation, or leave it out."
            )
        if self.save_masks is not None and len(self.model_names) > 1:
            raise ValueError(f"save_masks keeps the masks of one encoder, got model={self.model}.")
        if self.mask_column is not None and self.mask_dir is not None:
            raise ValueError("mask_column and mask_dir exclude each other, got both.")
        _ = self.map_input, self.void
        tuned = [name for name in self.protocol_names if name.startswith("finetune")]
        if self.save_classifier is not None and (len(tuned) != 1 or len(self.model_names) > 1):
            raise ValueError(
                "save_classifier keeps the classifier of one encoder and one of finetune, "
                f"finetune-1 and finetune-10, got model={self.model} and "
                f"protocols={self.protocols}."
            )
        subset = self.label_fraction is not None or self.label_list is not None
        if subset and "finetune" not in self.protocol_names:
            raise ValueError(
                "label_fraction and label_list are settings of the protocol finetune, got "
                f"protocols={self.protocols}; finetune-1 and finetune-10 have their own."
            )
        if self.output_dir is None:
            names = "-".join(run_name(model) for model in self.model_names)
            data = Path(self.dataset_name)
            data = data.resolve() if data.exists() else data
            self._fill(output_dir=f"evaluations/{names}-on-{data.name}")

    @property
    def model_names(self) -> list[str]:
        """Each encoder once, in the order of the setting."""
        return split_names(self.model)

    @property
    def protocol_names(self) -> list[str]:
        """Each protocol once, in the order of the setting."""
        return split_names(self.protocols)

    def numbers(self, name: str, most: int | None = None) -> list[int]:
        """A setting of whole numbers joined by commas, in ascending order.

        Args:
            most: the greatest that a default may hold; by default any.
        """
        text = getattr(self, name)
        if text is None:
            usual = USUAL_NEIGHBOURS[name]
            return usual if most is None else [k for k in usual if k <= most] or [most]
        try:
            found = [int(number) for number in str(text).split(",")]
        except ValueError:
            found = []
        if not found or min(found) < 1:
            raise ValueError(
                f"{name} must be positive whole numbers joined by commas, got {text!r}."
            )
        return sorted(set(found))

    @property
    def map_input(self) -> tuple[int, int] | None:
        """Height and width in pixels of the images that segmentation encodes; None if not given."""
        if self.image_size is None:
            return None
        sides = str(self.image_size).lower().split("x")
        if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
            raise ValueError(
                "image_size must be a side in pixels, as 480, or height x width, as 360x480, got "
                f"{self.image_size!r}."
            )
        return int(sides[0]), int(sides[-1])

    @property
    def void(self) -> frozenset[int]:
        """Numbers in masks that count for nothing."""
        if self.ignore_index == NO_VOID:
            return frozenset()
        numbers = str(self.ignore_index).split(",")
        if not all(number.strip().isdecimal() for number in numbers):
            raise ValueError(
                "ignore_index must be numbers from 0 joined by commas, as 11,255, or none, got "
                f"{self.ignore_index!r}."
            )
        return frozenset({int(USUAL_VOID), *map(int, numbers)})

    def training(self, protocol: str) -> tuple[FinetuneSettings, float]:
        """How one of `TRAINED` trains, and on which fraction of the labels."""
        settings, fraction = TRAINED[protocol]
        changes: dict[str, Any] = {
            "epochs": self.epochs, "batch_size": self.train_batch_size, "lr_head": self.lr_head,
            "lr_backbone": None if settings.frozen else self.lr_backbone,
            "weight_decay": self.weight_decay, "seed": self.seed,
            "scale": None if self.crop_scale is None else (self.crop_scale, 1.0),
        }  # fmt: skip
        if protocol == "finetune":
            fraction = self.label_fraction or 1.0
        changed: Any = {name: value for name, value in changes.items() if value is not None}
        return replace(settings, **changed), fraction


def split_names(text: str) -> list[str]:
    """Names joined by commas, each once; a path that exists may hold commas itself."""
    names = [text] if Path(text).exists() else [name.strip() for name in text.split(",")]
    return list(dict.fromkeys(name for name in names if name))


def run_name(model: str) -> str:
    """The last part of a path or id; an encoder is known by the run that made it."""
    # resolved, so that . and .. have names
    path = Path(model).resolve() if Path(model).exists() else Path(model)
    return path.parent.name if path.name == "encoder" else path.name
