"""Every setting of a pretraining run."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml

from vicreg_hf.configuration_vicreg import MODALITIES
from vicreg_hf.data.opening.dataset import DEMO
from vicreg_hf.hub.api import check_repo_id
from vicreg_hf.runtime.checks import is_whole, read_widths
from vicreg_hf.settings.base import (
    Count,
    Limit,
    NotNegative,
    Positive,
    Settings,
    Share,
    WholeFromZero,
    one_of,
)
from vicreg_hf.settings.learning_rate import default_base_lr
from vicreg_hf.settings.parser import SettingsParser
from vicreg_hf.settings.recipes import as_flags
from vicreg_hf.views.presets import PRESETS, describe, find_recipes

_ENCODER = {"prime_architecture", "prime_model_args", "prime_pretrained", "prime_expander_dims"}
TAKEN_BY: dict[str | None, set[str]] = {
    None: set(),
    "image": _ENCODER | {"prime_column", "prime_image_size"},
    "text": _ENCODER | {"prime_column", "prime_tokenizer", "prime_max_length"},
    "audio": _ENCODER | {"prime_column", "prime_image_size"},
    "embedding": {"prime_column", "prime_expander_dims"},
}
"""Settings of the second branch that each of its inputs has; None is no second branch."""


@dataclass(frozen=True)
class PretrainingArguments(Settings):
    """Settings of `pretrain`; the defaults are the authors' where they have one.

    A None is filled in from the other settings or the data, and config.yaml shows with what.
    """

    script: ClassVar[str] = "scripts/pretrain.py"

    dataset_name: str = DEMO
    """Hub id, local folder or file, or demo, the handwritten digits of scikit-learn."""
    dataset_config_name: str | None = None
    """Configuration of a Hub data set."""
    train_split: str = "train"
    """Split to train on, or part such as train[:90%]; its labels are not learned."""
    eval_split: str | None = None
    """Held-out split for the kNN accuracy; by default test or validation, if there."""
    image_column: str | None = None
    """Column of images; by default the only column of that type."""
    value_range: str | None = None
    """Values that become black and white, as LOW,HIGH, where images have more than 8 bits; by
    default the least and the largest in a sample of the training images."""
    decode: Annotated[str, one_of("reduced", "exact")] = "reduced"
    """exact: decode images whole; reduced: decode JPEGs of 4 megapixels and more at 1/2 or 1/4, if
    crops have pixels to spare, which is faster and a fraction of a gray level off."""
    label_column: str | None = None
    """Column of classes for kNN and probe; by default the only one, or the one called label."""
    streaming: bool = False
    """Read the data while training, where they do not fit on the disk."""
    max_bad_fraction: Share = 0.05
    """Share of the images that may be unusable, and are replaced, before a run stops."""
    architecture: str = "resnet50"
    """Name of any timm model."""
    model_args: dict[str, Any] | str | None = None
    """JSON of keyword arguments for timm.create_model."""
    pretrained: bool = False
    """Start from timm's pretrained weights."""
    expander_dims: str = "8192-8192-8192"
    """Widths of the expander's layers; in Python also a list of them."""
    weights: Annotated[str, one_of("shared", "separate")] = "shared"
    """shared by both branches, or separate: the second has weights of its own, as it always has
    where its architecture or its input is another."""
    prime_modality: Annotated[str, one_of(*MODALITIES)] | None = None
    """Input of the second branch: image, text, audio, embedding; by default views of the images."""
    prime_column: str | None = None
    """Column that the second branch takes; by default the only one of its type. A column of images
    must be named."""
    prime_architecture: str | None = None
    """Any timm model for images and spectrograms; for text and waveforms a Hub id, a directory, or
    a model type of transformers."""
    prime_model_args: dict[str, Any] | str | None = None
    """JSON of keyword arguments for timm, or of fields of transformers' configuration."""
    prime_pretrained: bool = False
    """Start the second branch from pretrained weights."""
    prime_tokenizer: str | None = None
    """Tokenizer, as Hub id or directory; by default that of prime_architecture."""
    prime_max_length: Count | None = None
    """Tokens that are read of each text; by default 64, or all that the encoder takes."""
    prime_expander_dims: str | None = None
    """Widths of the second branch's expander; the last must be that of expander_dims."""
    prime_image_size: Count | None = None
    """Side of the second branch's views in pixels; by default image_size."""
    audio_seconds: Positive = 5.0
    """Seconds of sound that are taken of each clip; the rest is cut."""
    sampling_rate: Count = 16_000
    """Samples per second to which sound is resampled."""
    sim_coeff: NotNegative = 25.0
    """Weight of the invariance term."""
    std_coeff: NotNegative = 25.0
    """Weight of the variance term."""
    cov_coeff: NotNegative = 1.0
    """Weight of the covariance term."""
    variance_reduction: Annotated[str, one_of("mean", "sum")] = "mean"
    """mean (the authors' code) or sum (the paper) of the branches' variance terms."""
    image_size: Count | None = None
    """Side of a view in pixels; by default 224, or the images' own if all are square, alike and at
    most 64."""
    augmentation: dict[str, Any] | str | None = None
    """Distribution of the views: authors, paper, cifar, tiny, demo, audio, or a YAML file; by
    default authors, or cifar up to 64 pixels."""
    num_global_views: Annotated[int, Limit("at least 2", lambda n: n >= 2)] = 2
    """Views of image_size from each image; of two branches the second gets the second view."""
    num_local_views: WholeFromZero = 0
    """Smaller crops of each image beside these (multi-crop)."""
    local_image_size: Count | None = None
    """Side of a local view in pixels; by default 96/224 of image_size."""
    batch_size: Count = 256
    """Images per step over all processes; each gives two views or more."""
    micro_batch_size: Count | None = None
    """Images of a step, over all processes, whose activations are in memory at once; fewer take
    less memory and at most half as much time again. By default the whole batch."""
    num_train_epochs: Positive = 100.0
    """Passes over the training split."""
    max_steps: Count | None = None
    """Optimiser steps, instead of num_train_epochs."""
    optimizer: str = "lars"
    """lars (the authors') or any optimiser of timm."""
    base_lr: NotNegative | None = None
    """Learning rate per 256 images; by default the paper's for the batch size."""
    weight_decay: NotNegative = 1e-6
    """Weight decay, except for biases and normalisation."""
    lars_eta: Positive = 1e-3
    """Trust coefficient of lars."""
    lars_clip: bool = False
    """Let lars give no parameter a higher learning rate than the run's, as solo-learn."""
    warmup_epochs: NotNegative | None = None
    """Epochs of linear warm-up; by default 10, but at most a tenth of the run."""
    seed: WholeFromZero = 0
    """Seed of weights, order of images, and views."""
    num_workers: WholeFromZero | None = None
    """Processes that decode images, for each that trains; by default its share of the cores."""
    compile: bool | None = None
    """Fuse the making of views with torch.compile; by default on GPUs."""
    compile_model: bool | None = None
    """Fuse backbone and expander with torch.compile, which takes a minute or more at the start; by
    default on GPUs for runs of 2000 steps and more, except with batch normalisation over several
    processes."""
    output_dir: str | None = None
    """Directory of the run; by default runs/ and the data set's name."""
    logging_steps: Count = 50
    """Steps between lines of metrics.jsonl."""
    save_steps: Count = 1000
    """Steps between checkpoints; one is also saved at the end."""
    resume: Annotated[str, one_of("auto", "never", "required")] = "auto"
    """auto: go on from the newest checkpoint, if there is one; required: fail without one; never:
    begin anew."""
    resume_changed: bool = False
    """Go on although model, batch, seed or data differ from the checkpoint's."""
    knn_steps: Count | None = None
    """Steps between kNN measurements; by default only before and after training."""
    online_probe: bool = False
    """Train a linear classifier beside the encoder, which learns nothing from it, and measure it
    whenever kNN is measured."""
    report_to: str = "none"
    """Trackers that also get the numbers of metrics.jsonl, separated by commas: tensorboard, wandb,
    mlflow or any other of accelerate's."""
    push_to_hub: bool = False
    """Push the encoder and its card to the Hub at the end; checked at the start."""
    hub_model_id: str | None = None
    """Repository of the encoder, org/name; it is made if absent."""
    hub_private: bool = False
    """If the repository is made, make it private."""

    def __post_init__(self) -> None:
        for name in ("expander_dims", "prime_expander_dims"):
            widths: Any = getattr(self, name)
            if is_whole(widths) or isinstance(widths, (list, tuple)):
                widths = [widths] if is_whole(widths) else widths
                self._fill(**{name: "-".join(map(str, read_widths(name, widths)))})
        super().__post_init__()
        self._fill(report_to=",".join(_read_trackers(self.report_to)) or "none")
        self._read_range()
        for name in ("model_args", "prime_model_args"):
            self._fill(**{name: _read_json(name, getattr(self, name))})
        self._read_augmentation()
        self._check_second_branch()
        if self.expander_widths[-1] != self.prime_expander_widths[-1]:
            raise ValueError(
                "both expanders must end in the same width, got "
                f"expander_dims={self.expander_dims} and "
                f"prime_expander_dims={self.prime_expander_dims}."
            )
        if not isinstance(self.in_chans, int) or self.in_chans < 1:
            raise ValueError(f"in_chans must be a positive integer, got {self.in_chans!r}.")
        if self.hub_model_id is not None:
            check_repo_id(self.hub_model_id, "hub_model_id")
        elif self.push_to_hub:
            raise ValueError("push_to_hub needs hub_model_id, org/name, and got none.")
        if self.base_lr is None:
            self._fill(base_lr=default_base_lr(self.optimizer, self.batch_size))
        if self.output_dir is None:
            # resolved, so that . and .. have names
            self._fill(output_dir=f"runs/{Path(self.dataset_name).resolve().name}")

    def _read_augmentation(self) -> None:
        """Keep the name of a preset, and the content of anything else, so that a run repeats it."""
        content = self.augmentation
        if isinstance(content, str) and content.lstrip().startswith("{"):
            content = _read_json("augmentation", content)
        if content is not None and not (isinstance(content, str) and content in PRESETS):
            self._fill(augmentation=describe(find_recipes(content)))

    def _check_second_branch(self) -> None:
        """Find out whether there is a second branch, and refuse settings that contradict it."""
        if self.prime_modality is None and self.prime_column is not None:
            raise ValueError(
                "prime_modality must say what prime_column holds, got none for column "
                f"{self.prime_column!r}; use one of {', '.join(MODALITIES)}."
            )
        own_weights = self.weights == "separate" or self.prime_architecture is not None
        if self.prime_modality is None and own_weights:
            self._fill(prime_modality="image")
        modality = self.prime_modality
        others = set().union(*TAKEN_BY.values()) - TAKEN_BY[modality]
        ignored = [name for name in sorted(others) if getattr(self, name) not in (None, False)]
        if ignored:
            raise ValueError(
                f"{', '.join(ignored)} must be left out with {modality or 'no second branch'}; "
                "prime_modality, prime_architecture or weights say what a second branch takes."
            )
        if modality is None:
            return
        self._fill(weights="separate")
        if self.pretrained and modality == "image" and self.prime_architecture is None:
            self._fill(prime_pretrained=True)  # the same architecture, from the same weights
        if modality in ("text", "audio") and self.prime_architecture is None:
            raise ValueError(f"prime_architecture must name the encoder of {modality}, got none.")
        if self.streaming and self.is_paired:
            raise ValueError(
                f"streaming must be false for a second branch that takes {modality} of a column; "
                "only data on disk are read in pairs."
            )

    @property
    def is_paired(self) -> bool:
        """Whether the second branch takes something else than views of the same images."""
        return self.prime_modality not in (None, "image") or self.prime_column is not None

    @property
    def num_views(self) -> int:
        """Views of each image; what the second branch takes of another kind counts as one."""
        return self.num_global_views + self.num_local_views

    @property
    def trackers(self) -> list[str]:
        """`report_to` as names."""
        return _read_trackers(self.report_to)

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
        """`prime_expander_dims` as integers; by default those of the first branch."""
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
            ValueError: no such recipe, file or setting, or a value that cannot be.
        """
        with redirect_stderr(io.StringIO()) as said:
            try:
                return SettingsParser(cls).read(as_flags(overrides), name_or_path)
            except SystemExit:  # which is for scripts
                raise ValueError(said.getvalue().removeprefix("error: ").strip()) from None


def _read_trackers(report_to: Any) -> list[str]:
    """The names in `report_to`, which may also be a list of them in Python, each once.

    Raises:
        ValueError: accelerate has no such tracker.
    """
    listed = isinstance(report_to, (list, tuple))
    report_to = ",".join(map(str, report_to)) if listed else str(report_to or "none")
    names = list(dict.fromkeys(name for name in re.split(r"[\s,]+", report_to.lower()) if name))
    if names in ([], ["none"]):
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # which takes a second

    if unknown := [name for name in names if name not in LOGGER_TYPE_TO_CLASS]:
        raise ValueError(
            f"report_to must be none, or some of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}, "
            f"separated by commas, got {', '.join(unknown)}."
        )
    return names


def _read_json(name: str, value: Any) -> dict[str, Any] | None:
    read = value
    if isinstance(value, str):
        try:
            read = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} must be a JSON object, got {value!r}: {error}.") from error
    if read is not None and not isinstance(read, dict):
        raise ValueError(f"{name} must be a JSON object, got {value!r}.")
    return read
