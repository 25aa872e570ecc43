"""Every setting of a pretraining run, and how the command line and recipes fill them."""

from __future__ import annotations

import io
import json
import math
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vicreg_hf.configuration_vicreg import MODALITIES
from vicreg_hf.data.memory import SMALL_IMAGE
from vicreg_hf.data.opening.dataset import DEMO
from vicreg_hf.hub.api import check_repo_id
from vicreg_hf.runtime.checks import is_whole, read_widths, settle_kinds
from vicreg_hf.settings.parser import SettingsParser
from vicreg_hf.settings.recipes import as_flags, read_recipe
from vicreg_hf.views.presets import PRESETS, describe, find_recipes

_ENCODER = {"prime_architecture", "prime_model_args", "prime_pretrained", "prime_expander_dims"}
TAKEN_BY: dict[str | None, set[str]] = {
    None: set(),
    "image": _ENCODER | {"prime_column", "prime_image_size"},
    "text": _ENCODER | {"prime_column", "prime_tokenizer", "prime_max_length"},
    "audio": _ENCODER | {"prime_column", "prime_image_size"},
    "embedding": {"prime_column", "prime_expander_dims"},
}
"""Settings of the second branch, by what it takes; None is no second branch."""


def _setting(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass
class PretrainingArguments:
    """Settings of `pretrain`; the defaults are the authors' where they have one.

    A None is filled in from the other settings or the data, and config.yaml shows with what.
    """

    dataset_name: str = _setting(
        DEMO, "Hub id, local folder or file, or demo, the embedded digits."
    )
    dataset_config_name: str | None = _setting(None, "Configuration of a Hub data set.")
    train_split: str = _setting(
        "train", "Split to train on, or part such as train[:90%%]; labels are never used for that."
    )
    eval_split: str | None = _setting(
        None, "Held-out split of the kNN monitor; by default test or validation, if there."
    )
    image_column: str | None = _setting(None, "Column of images; found by its type if only one.")
    label_column: str | None = _setting(
        None, "Column of classes for kNN monitor and probe; by default the only one, or label."
    )
    streaming: bool = _setting(
        False, "Read the data as they are needed, for what does not fit on the disk."
    )
    max_bad_fraction: float = _setting(
        0.05, "Share of images that may be unusable, and are replaced, before a run stops."
    )
    architecture: str = _setting("resnet50", "Any timm model.")
    model_args: dict[str, Any] | str | None = _setting(
        None, "JSON of keyword arguments for timm.create_model."
    )
    pretrained: bool = _setting(False, "Start from timm's pretrained weights.")
    expander_dims: str = _setting(
        "8192-8192-8192", "Widths of the expander's layers; in Python also a list of them."
    )
    weights: str = _setting(
        "shared",
        "shared by both branches, or separate: the second has weights of its own, as it has where "
        "its architecture or what it takes is another.",
    )
    prime_modality: str | None = _setting(
        None,
        f"What the second branch takes: {', '.join(MODALITIES)}; by default the images' second "
        "views.",
    )
    prime_column: str | None = _setting(
        None,
        "Column of what the second branch takes; found by its type if only one, but for images, "
        "which are the first branch's unless it is named.",
    )
    prime_architecture: str | None = _setting(
        None,
        "Of the second branch: any timm model for images and spectrograms; for text and waveforms "
        "a Hub id, a directory, or a model type of transformers.",
    )
    prime_model_args: dict[str, Any] | str | None = _setting(
        None, "JSON of keyword arguments for it, or of fields of its configuration."
    )
    prime_pretrained: bool = _setting(False, "Start the second branch from pretrained weights.")
    prime_tokenizer: str | None = _setting(
        None, "Hub id or directory; by default that of prime_architecture."
    )
    prime_max_length: int | None = _setting(
        None, "Tokens of a text that are read; by default 64, or all that the encoder takes."
    )
    prime_expander_dims: str | None = _setting(
        None, "Widths of the second branch's expander, the last that of expander_dims."
    )
    prime_image_size: int | None = _setting(
        None, "Side of the second branch's views in pixels; by default image_size."
    )
    audio_seconds: float = _setting(5.0, "Length of sound that is seen; longer clips are cut.")
    sampling_rate: int = _setting(16_000, "Samples per second that sound is brought to.")
    sim_coeff: float = _setting(25.0, "Weight of the invariance term.")
    std_coeff: float = _setting(25.0, "Weight of the variance term.")
    cov_coeff: float = _setting(1.0, "Weight of the covariance term.")
    variance_reduction: str = _setting(
        "mean", "mean (the authors' code) or sum (the paper) of the branches' variance terms."
    )
    image_size: int | None = _setting(
        None,
        "Side of a view in pixels; by default 224, or the images' own if "
        f"all are square, alike and at most {SMALL_IMAGE}.",
    )
    augmentation: dict[str, Any] | str | None = _setting(
        None,
        f"One of {', '.join(PRESETS)}, or a YAML file of your own; by default authors, or cifar up "
        "to 64 pixels.",
    )
    num_global_views: int = _setting(
        2, "Views of image_size from each image; with two branches the second gives the other."
    )
    num_local_views: int = _setting(0, "Smaller crops of each image beside these (multi-crop).")
    local_image_size: int | None = _setting(
        None, "Side of a local view in pixels; by default 96 of 224 as much as image_size."
    )
    batch_size: int = _setting(
        256, "Images per step over all processes; each gives two views or more."
    )
    micro_batch_size: int | None = _setting(
        None,
        "Images of a step, over all processes, of which the backbone holds activations at once; "
        "less memory for at most half as much time again. By default the whole batch.",
    )
    num_train_epochs: float = _setting(100.0, "Passes over the training split.")
    max_steps: int | None = _setting(None, "Optimiser steps, instead of num_train_epochs.")
    optimizer: str = _setting("lars", "lars (the authors') or any optimiser of timm.")
    base_lr: float | None = _setting(
        None, "Learning rate per 256 images; by default the paper's for the batch size."
    )
    weight_decay: float = _setting(1e-6, "Left out for biases and normalisation.")
    lars_eta: float = _setting(1e-3, "Trust coefficient of lars.")
    lars_clip: bool = _setting(
        False, "Let lars give no parameter a higher learning rate than the run's, as solo-learn."
    )
    warmup_epochs: float | None = _setting(
        None, "Epochs of linear warm-up; by default 10, but at most a tenth of the run."
    )
    seed: int = _setting(0, "Decides weights, order and views.")
    num_workers: int | None = _setting(
        None, "Image-decoding workers per process; by default its share of the cores."
    )
    compile: bool | None = _setting(
        None, "Fuse the making of views with torch.compile; by default on GPUs."
    )
    compile_model: bool | None = _setting(
        None,
        "Fuse backbone and expander with torch.compile, which takes a minute or more at the start; "
        "by default on GPUs for runs of 2000 steps and more, but for batch normalisation over "
        "several processes.",
    )
    output_dir: str | None = _setting(None, "By default runs/ and the data set's name.")
    logging_steps: int = _setting(50, "Steps between lines of metrics.jsonl.")
    save_steps: int = _setting(1000, "Steps between checkpoints; one is also saved at the end.")
    resume: str = _setting("auto", "auto, never, or required: go on from the newest checkpoint.")
    resume_changed: bool = _setting(
        False, "Go on although batch, seed or data are other than the checkpoint's."
    )
    knn_steps: int | None = _setting(
        None, "Steps between kNN measurements; by default only before and after training."
    )
    online_probe: bool = _setting(
        False,
        "Train a linear classifier beside the encoder, which learns nothing from it, and measure "
        "it whenever kNN is.",
    )

    push_to_hub: bool = _setting(
        False, "Push the encoder and its card to the Hub at the end; checked at the start."
    )
    hub_model_id: str | None = _setting(None, "Where to: org/name, made if absent.")
    hub_private: bool = _setting(False, "Make the repository private, if it is made.")

    def __post_init__(self) -> None:
        settle_kinds(self)
        self.model_args = _json_object("model_args", self.model_args)
        self.prime_model_args = _json_object("prime_model_args", self.prime_model_args)
        self._join_widths()
        self._settle_augmentation()
        self._settle_second_branch()
        if self.resume not in ("auto", "never", "required"):
            raise ValueError(f"resume must be auto, never or required, got {self.resume!r}.")
        if self.variance_reduction not in ("mean", "sum"):
            raise ValueError(
                f"variance_reduction must be mean or sum, got {self.variance_reduction!r}."
            )
        for name in ("batch_size", "micro_batch_size", "logging_steps", "save_steps", "image_size",
                     "max_steps", "knn_steps", "num_train_epochs", "prime_max_length",
                     "prime_image_size", "local_image_size", "audio_seconds",
                     "sampling_rate", "lars_eta"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}.")
        for name in ("base_lr", "weight_decay", "warmup_epochs", "num_workers", "seed",
                     "sim_coeff", "std_coeff", "cov_coeff", "num_local_views"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}.")
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}.")
        if self.num_global_views < 2:
            raise ValueError(f"num_global_views must be at least 2, got {self.num_global_views}.")
        own, prime = self.expander_widths, self.prime_expander_widths
        if own[-1] != prime[-1]:
            raise ValueError(
                "both expanders must end in the same width, got "
                f"expander_dims={self.expander_dims} and "
                f"prime_expander_dims={self.prime_expander_dims}."
            )
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(
                f"max_bad_fraction must lie between 0 and 1, got {self.max_bad_fraction}."
            )
        if not isinstance(self.in_chans, int) or self.in_chans < 1:
            raise ValueError(f"in_chans must be a positive integer, got {self.in_chans!r}.")
        if self.hub_model_id is not None:
            check_repo_id(self.hub_model_id, "hub_model_id")
        elif self.push_to_hub:
            raise ValueError("push_to_hub needs hub_model_id, org/name, and got none.")
        if self.base_lr is None:
            self.base_lr = default_base_lr(self.optimizer, self.batch_size)
        if self.output_dir is None:
            # resolved, so that . and .. have names
            self.output_dir = f"runs/{Path(self.dataset_name).resolve().name}"

    def _join_widths(self) -> None:
        """Leave the widths of expanders as flags have them, also where integers are given."""
        for name in ("expander_dims", "prime_expander_dims"):
            given: Any = getattr(self, name)
            if isinstance(given, (list, tuple)):
                setattr(self, name, "-".join(map(str, read_widths(name, given))))
            elif is_whole(given):
                setattr(self, name, str(given))

    def _settle_augmentation(self) -> None:
        """Leave the name of a preset; of anything else what it says, so that a run repeats it."""
        given = self.augmentation
        if isinstance(given, str) and given.lstrip().startswith("{"):
            try:
                given = json.loads(given)
            except json.JSONDecodeError as error:
                raise ValueError(f"augmentation must be valid JSON, got {given!r}.") from error
        if given is not None:
            recipes = find_recipes(given)
            preset = isinstance(given, str) and given in PRESETS
            self.augmentation = given if preset else describe(recipes)

    def _settle_second_branch(self) -> None:
        """Find out whether there is one, and refuse what does not go together."""
        if self.weights not in ("shared", "separate"):
            raise ValueError(f"weights must be shared or separate, got {self.weights!r}.")
        if self.prime_modality is not None and self.prime_modality not in MODALITIES:
            raise ValueError(
                f"prime_modality must be one of {', '.join(MODALITIES)}, got "
                f"{self.prime_modality!r}."
            )
        if self.prime_modality is None and self.prime_column is not None:
            raise ValueError(
                "prime_modality must say what prime_column holds, got none for column "
                f"{self.prime_column!r}; use one of {', '.join(MODALITIES)}."
            )
        asked = self.weights == "separate" or self.prime_architecture is not None
        if self.prime_modality is None and asked:
            self.prime_modality = "image"
        taken = TAKEN_BY[self.prime_modality]
        ignored = [
            name for name in set().union(*TAKEN_BY.values()) - taken
            if getattr(self, name) not in (None, False)
        ]  # fmt: skip
        if ignored:
            branch = "no second branch" if self.prime_modality is None else self.prime_modality
            raise ValueError(
                f"{', '.join(sorted(ignored))} must be left out with {branch}; what a second "
                "branch takes is said by prime_modality, prime_architecture or weights."
            )
        if self.prime_modality is None:
            return
        self.weights = "separate"
        if self.pretrained and self.prime_modality == "image" and self.prime_architecture is None:
            self.prime_pretrained = True  # the same architecture, from the same weights
        if self.prime_modality in ("text", "audio") and self.prime_architecture is None:
            raise ValueError(
                f"prime_architecture must name the encoder of {self.prime_modality}, got none."
            )
        if self.streaming and self.is_paired:
            raise ValueError(
                f"streaming must be false for a second branch that takes {self.prime_modality} of "
                "a column; only data on disk are read in pairs."
            )

    @property
    def is_paired(self) -> bool:
        """Whether the second branch takes something else than views of the same images."""
        return self.prime_modality not in (None, "image") or self.prime_column is not None

    @property
    def num_views(self) -> int:
        """Of each image; what the second branch takes of another kind counts as one."""
        return self.num_global_views + self.num_local_views

    @property
    def in_chans(self) -> int:
        """Channels of the images, as model_args says."""
        assert not isinstance(self.model_args, str)
        return (self.model_args or {}).get("in_chans", 3)

    @property
    def expander_widths(self) -> list[int]:
        """`expander_dims` as integers."""
        return read_widths("expander_dims", self.expander_dims)

    @property
    def prime_expander_widths(self) -> list[int]:
        """Of the second branch, if there is one; else the first's."""
        if self.prime_expander_dims is None:
            return self.expander_widths
        return read_widths("prime_expander_dims", self.prime_expander_dims)

    def to_yaml(self) -> str:
        """All settings, as --config takes them."""
        return yaml.safe_dump(asdict(self), sort_keys=False)

    @classmethod
    def from_recipe(cls, name_or_path: str, **overrides: Any) -> PretrainingArguments:
        """A shipped recipe or YAML file, with some settings replaced.

        Raises:
            ValueError: no such recipe, file or setting, or one that cannot be.
        """
        with redirect_stderr(io.StringIO()) as said:
            try:
                words = as_flags(read_recipe(name_or_path, cls, "scripts/pretrain.py"))
                words += as_flags(overrides)
                return cls(**vars(SettingsParser(cls).parse_args(words)))
            except SystemExit:  # which is for scripts
                raise ValueError(said.getvalue().removeprefix("error: ").strip()) from None


def _json_object(name: str, given: Any) -> dict[str, Any] | None:
    read = given
    if isinstance(given, str):
        try:
            read = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} must be a JSON object, got {given!r}: {error}.") from error
    if read is not None and not isinstance(read, dict):
        raise ValueError(f"{name} must be a JSON object, got {given!r}.")
    return read


# Paper, appendix C.4: best base learning rate of a 100-epoch run by global batch size.
BASE_LR_BY_BATCH = {128: 0.8, 256: 0.5, 512: 0.4}
BASE_LR_LARGE_BATCH = 0.3


def default_base_lr(optimizer: str, batch_size: int) -> float:
    """The base learning rate per 256 images where none is given.

    For LARS the paper's table by batch size; for others 1e-3, AdamW's usual one.
    """
    if optimizer != "lars":
        return 1e-3
    at_least = [rate for size, rate in BASE_LR_BY_BATCH.items() if batch_size <= size]
    return at_least[0] if at_least else BASE_LR_LARGE_BATCH
