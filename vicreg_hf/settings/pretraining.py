"""Every setting of a pretraining run."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import yaml

from vicreg_hf.data.opening import DEMO
from vicreg_hf.hub.api import check_licence, check_repo_id
from vicreg_hf.models import MODALITIES
from vicreg_hf.runtime.checks import is_whole, read_widths
from vicreg_hf.settings.base import (
    Count,
    Limit,
    NotNegative,
    Positive,
    PositiveShare,
    Settings,
    Share,
    WholeFromZero,
    one_of,
)
from vicreg_hf.settings.learning_rate import default_base_lr
from vicreg_hf.settings.parser import SettingsParser
from vicreg_hf.settings.recipes import as_flags
from vicreg_hf.views.presets import PRESETS, describe, find_recipes

_ENCODER = {
    "prime_architecture", "prime_model_args", "prime_pretrained", "prime_init_from",
    "prime_expander_dims",
}  # fmt: skip
DEFAULT_ARCHITECTURE = "resnet50"
TAKEN_BY: dict[str | None, set[str]] = {
    None: set(),
    "image": _ENCODER | {"prime_column", "prime_image_size"},
    "text": _ENCODER | {"prime_column", "prime_tokenizer", "prime_max_length"},
    "audio": _ENCODER | {"prime_column", "prime_image_size"},
    "embedding": {"prime_column", "prime_expander_dims"},
}
"""Settings of the second branch that each of its inputs has; None is no second branch."""


class Measure(NamedTuple):
    """A measurement by which the best step can be chosen."""

    words: str
    columns: tuple[str, ...]
    """Its numbers in metrics.jsonl, which are added up."""
    sign: int = 1
    """1 where more is better, -1 where less is."""
    labelled: bool = False
    """Whether it needs images with classes; it is a share, then."""


MEASURES = {
    "knn": Measure("20-NN accuracy", ("knn",), labelled=True),
    "probe": Measure("accuracy of the online linear probe", ("probe",), labelled=True),
    "effective_rank": Measure("effective rank of representations", ("sample_effective_rank",)),
    "embedding_effective_rank": Measure(
        "effective rank of embeddings", ("sample_embedding_effective_rank",)
    ),
    "uniformity": Measure("uniformity of representations", ("sample_uniformity",), -1),
    "alignment_uniformity": Measure(
        "alignment plus uniformity of representations",
        ("sample_alignment", "sample_uniformity"),
        -1,
    ),
}
"""The measures that keep_best takes. Alignment alone is none: it is best in a collapsed encoder."""
_MONITOR_DETAILS = (
    "monitor_dataset_config_name", "monitor_train_split", "monitor_eval_split",
    "monitor_image_column", "monitor_label_column",
)  # fmt: skip


@dataclass(frozen=True)
class PretrainingArguments(Settings):
    """Settings of `pretrain`; the defaults are the authors' where they have one.

    A None is filled in from the other settings or the data, and config.yaml shows with what.
    """

    command: ClassVar[str] = "vicreg-hf pretrain"
    usual: ClassVar[tuple[str, ...]] = (
        "dataset_name", "architecture", "pretrained", "augmentation", "batch_size",
        "num_train_epochs", "base_lr", "output_dir",
    )  # fmt: skip
    headings: ClassVar[dict[str, str]] = {
        "dataset_name": "data", "architecture": "backbone and expander",
        "weights": "second branch", "sim_coeff": "loss", "image_size": "views",
        "batch_size": "optimisation", "num_workers": "speed",
        "output_dir": "output and resuming", "knn_steps": "monitoring", "push_to_hub": "Hub",
    }  # fmt: skip

    dataset_name: str = DEMO
    """Hub id, local folder or file, or demo, the handwritten digits of scikit-learn."""
    dataset_config_name: str | None = None
    """Configuration of a Hub data set."""
    train_split: str = "train"
    """Split to train on, or part such as train[:90%]; its labels are not learned."""
    eval_split: str | None = None
    """Held-out split for the kNN accuracy; by default test or validation, and where there is none
    each training image is classified by all others."""
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
    monitor_dataset_name: str | None = None
    """Labelled data set, Hub id, local folder or file, that kNN is measured on; by default the one
    trained on."""
    monitor_dataset_config_name: str | None = None
    """Configuration of a Hub data set to measure on."""
    monitor_train_split: str | None = None
    """Its split of neighbours; by default train, or the only one."""
    monitor_eval_split: str | None = None
    """Its split of images that are classified; by default test or validation, or where there is
    none each of its neighbours by all others."""
    monitor_image_column: str | None = None
    """Its column of images; by default the only column of that type."""
    monitor_label_column: str | None = None
    """Its column of classes; by default the only one, or the one called label."""
    streaming: bool = False
    """Read the data while training, where they do not fit on the disk."""
    max_bad_fraction: Share = 0.05
    """Share of the images that may be unusable, and are replaced, before a run stops."""
    architecture: str | None = None
    """Name of any timm model; by default resnet50, or that of init_from."""
    model_args: dict[str, Any] | str | None = None
    """JSON of keyword arguments for timm.create_model."""
    pretrained: bool = False
    """Start from timm's pretrained weights."""
    init_from: str | None = None
    """Start from an encoder: the output_dir of a run, an encoder's or a checkpoint's directory, or
    org/name on the Hub; beside a recipe it replaces architecture, model_args and pretrained."""
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
    prime_init_from: str | None = None
    """Start the second branch from an encoder, as init_from; of a run with two the second. By
    default init_from, where weights are separate and the architecture is the same."""
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
    local_weight: Annotated[float, Limit("at least 0 and below 1", lambda x: 0 <= x < 1)] = 0.0
    """Share of VICRegL's local loss in the whole loss, the paper's 1 - alpha: 0.1 or 0.25 for dense
    tasks such as segmentation; 0 is VICReg alone."""
    local_matches: Count = 20
    """Pairs of cells of two feature maps that the local loss keeps of each image, the paper's
    gamma."""
    local_view_matches: Count = 4
    """Pairs of cells that the local loss keeps of each global and local view; a local view is a
    smaller crop."""
    local_expander_dims: str = "512-512-512"
    """Widths of the layers of the local loss's own expander."""
    image_size: Count | None = None
    """Side of a view in pixels; by default 224, or the images' own if all are square, alike and at
    most 64, or that of init_from."""
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
    gradient_checkpointing: bool = False
    """Compute the encoders' activations again in the backward pass, and keep few of them in memory;
    the result is the same."""
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
    optimizer_args: dict[str, Any] | str | None = None
    """JSON of further arguments of the optimiser, such as {"betas": [0.9, 0.95]}."""
    layer_decay: PositiveShare | None = None
    """Factor by which each layer of an encoder learns more slowly than the one above it; the
    expander, above the last, learns at the full rate."""
    max_grad_norm: Positive | None = None
    """Norm to which the gradient of all parameters together is scaled down where it is larger."""
    freeze: str | None = None
    """Parts of the encoder that stay as they are: names of modules or parameters, or patterns such
    as blocks.[0-3], separated by commas; names of a second branch's encoder begin with prime."""
    ema_decay: Annotated[float, Limit("at least 0 and below 1", lambda x: 0 <= x < 1)] | None = None
    """Measure and publish a moving average of the weights, of which each step keeps this share."""
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
    logging_steps: Count | None = None
    """Steps between lines of metrics.jsonl; by default 50, or fewer in short runs, so that at least
    20 are written where there are as many steps."""
    save_steps: Count = 1000
    """Steps between checkpoints, of which the newest two are kept; one is also saved at the end."""
    keep_every: Count | None = None
    """Steps between checkpoints that are kept for good, whether or not save_steps saves them; each
    takes the disk space of weights and optimiser."""
    keep_best: Annotated[str, one_of("none", *MEASURES)] = "none"
    """Measure of which the best step is kept and becomes encoder/, or none for the last step; it
    takes the disk space of a checkpoint, or two while another is written."""
    resume: Annotated[str, one_of("auto", "never", "required")] = "auto"
    """auto: go on from the newest checkpoint, if there is one; required: fail without one; never:
    begin anew."""
    resume_changed: bool = False
    """Go on although model, batch, seed or data differ from the checkpoint's."""
    knn_steps: Count | None = None
    """Steps between measurements, by kNN and without labels; by default only before and after
    training, or with keep_best every save_steps."""
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
    publish_images: bool = False
    """Let pictures that show images of the data leave this machine, beside the pushed card and to
    trackers; else they stay beside the card in output_dir."""
    license: str | None = None
    """Licence of the weights, such as cc-by-4.0; by default that of the weights that a run starts
    from, and none if it starts from none."""

    def __post_init__(self) -> None:
        for name in ("expander_dims", "prime_expander_dims", "local_expander_dims"):
            widths: Any = getattr(self, name)
            if is_whole(widths) or isinstance(widths, (list, tuple)):
                widths = [widths] if is_whole(widths) else widths
                self._fill(**{name: "-".join(map(str, read_widths(name, widths)))})
        super().__post_init__()
        self._fill(report_to=",".join(_read_trackers(self.report_to)) or "none")
        self._read_range()
        for name in ("model_args", "prime_model_args", "optimizer_args"):
            self._fill(**{name: _read_json(name, getattr(self, name))})
        self._read_img_size()
        if isinstance(self.freeze, (list, tuple)):
            self._fill(freeze=",".join(self.freeze))
        if self.gradient_checkpointing and self.compile_model:
            raise ValueError(
                "compile_model must be false with gradient_checkpointing, got true; torch.compile "
                "decides by itself what it keeps in memory."
            )
        self._read_augmentation()
        if self.init_from is None and self.architecture is None:
            self._fill(architecture=DEFAULT_ARCHITECTURE)
        self._check_second_branch()
        self._check_local_loss()
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
        if self.license is not None:
            check_licence(self.license)
        self._check_measuring()
        if self.base_lr is None:
            self._fill(base_lr=default_base_lr(self.optimizer, self.batch_size))
        if self.output_dir is None:
            # resolved, so that . and .. have names
            self._fill(output_dir=f"runs/{Path(self.dataset_name).resolve().name}")

    def _check_local_loss(self) -> None:
        read_widths("local_expander_dims", self.local_expander_dims)
        if self.local_weight and self.prime_modality is not None:
            raise ValueError(
                "local_weight must be 0 with a second branch, as the local loss compares maps of "
                f"one encoder, got {self.local_weight} and prime_modality={self.prime_modality}."
            )
        names = ("local_matches", "local_view_matches", "local_expander_dims")
        given = [name for name in names if getattr(self, name) != getattr(type(self), name)]
        if given and not self.local_weight:
            raise ValueError(
                f"local_weight must be above 0 with {', '.join(given)}, which the local loss alone "
                "takes; VICRegL's is 0.1 or 0.25."
            )

    def _check_measuring(self) -> None:
        """Refuse measures that cannot be, and measure often enough to choose among steps."""
        if self.monitor_dataset_name is None:
            given = [n for n in _MONITOR_DETAILS if getattr(self, n) is not None]
            if given:
                raise ValueError(
                    f"{', '.join(given)} must be left out without monitor_dataset_name, the data "
                    "set that they are of."
                )
        elif self.online_probe:
            raise ValueError(
                "online_probe must be false with monitor_dataset_name: it is measured on held-out "
                "images of the classes that it learns."
            )
        if self.keep_best == "probe" and not self.online_probe:
            raise ValueError(
                "keep_best=probe must have a probe to measure; add --online_probe true."
            )
        if self.keep_best != "none" and self.knn_steps is None:
            self._fill(knn_steps=self.save_steps)

    def _read_img_size(self) -> None:
        """Let the views have the size that model_args asks for, unless the model takes any."""
        assert not isinstance(self.model_args, str)
        own = self.model_args or {}
        size = own.get("img_size")
        if not is_whole(size) or own.get("dynamic_img_size") or self.init_from is not None:
            return  # what is started from is adapted to image_size
        if self.image_size not in (None, size):
            raise ValueError(
                "image_size must be the img_size of model_args, which builds the encoder for views "
                f"of that size, got {self.image_size} and {size}; give one of them."
            )
        self._fill(image_size=size)

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
        own_weights = own_weights or self.prime_init_from is not None
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
        if self.init_from is not None and self.pretrained:
            raise ValueError(
                "pretrained must be false with init_from, which says where the weights are from, "
                f"got true and {self.init_from!r}."
            )
        if modality is None:
            return
        self._fill(weights="separate")
        if self.prime_init_from is not None and self.prime_pretrained and modality == "image":
            raise ValueError(
                "prime_pretrained must be false with prime_init_from, which says where the weights "
                f"are from, got true and {self.prime_init_from!r}."
            )
        if modality == "image" and self.prime_architecture is None and self.prime_init_from is None:
            # the same architecture, from the same weights
            self._fill(prime_init_from=self.init_from, prime_pretrained=self.pretrained)
        unnamed = self.prime_architecture is None and self.prime_init_from is None
        if modality in ("text", "audio") and unnamed:
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
    def local_expander_widths(self) -> list[int]:
        """`local_expander_dims` as integers."""
        return read_widths("local_expander_dims", self.local_expander_dims)

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
            f"separated by commas, got {report_to!r}; take out {', '.join(unknown)}."
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
