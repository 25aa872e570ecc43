"""VICRegConfig, and the config.json that every stock loader reads."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from vicreg_hf.loss.checks import check_coefficients
from vicreg_hf.models import MODALITIES
from vicreg_hf.models.resnets import published_name
from vicreg_hf.runtime.checks import check_number, is_whole, read_range, read_widths

INDEX_FILE = "vicreg.safetensors.index.json"
NESTED_KEY = "vicreg"
LOSS_FIELDS = ("sim_coeff", "std_coeff", "cov_coeff", "gamma", "eps", "variance_reduction")
METHOD_FIELDS = ("expander_dims", *LOSS_FIELDS, "spectrogram", "value_range")
LOCAL_FIELDS = ("local_weight", "local_matches", "local_view_matches", "local_expander_dims")
"""Fields that config.json holds only where the weights of a local expander stand beside it."""
PRIME_FIELDS = ("weights", "prime")
"""Fields that config.json holds only where the weights of a second branch stand beside it."""
PRIME_KEYS = (
    "modality", "architecture", "model_args", "pretrained_cfg", "encoder_config", "preparation",
    "num_features", "expander_dims",
)  # fmt: skip
"""The fields of `VICRegConfig.prime`, see `complete_prime`."""
OWN_FIELDS = (
    "architecture", "model_args", "pretrained_cfg", *METHOD_FIELDS, *LOCAL_FIELDS, "weights",
    "prime",
)  # fmt: skip
"""Our fields of a configuration; transformers adds its own."""


def complete_prime(description: Mapping[str, Any], config: VICRegConfig) -> dict[str, Any]:
    """Complete the description of a second branch with what the first one settles.

    Args:
        description: some of
            modality: one of `MODALITIES`, by default image.
            architecture: for images and spectrograms a timm model, by default the first branch's
                with its model_args; for texts and waveforms the name that encoder_config came from.
            model_args: keyword arguments for `timm.create_model`; likewise pretrained_cfg, as of
                the first branch.
            encoder_config: for texts and waveforms, the whole configuration of a model of
                transformers.
            preparation: for texts max_length in tokens, for waveforms sampling_rate in hertz and
                seconds, for spectrograms the fields of `SpectrogramSettings`,
                for images value_range.
            num_features: for precomputed embeddings, their width.
            expander_dims: widths of the second expander; by default the first's.
        config: the configuration of the first branch.

    Raises:
        ValueError: an unknown field or modality, expanders that end in different widths, a field
            that the modality needs and lacks, or one that is not what it must be.
    """
    _check_mapping("prime", description)
    if unknown := sorted(description.keys() - set(PRIME_KEYS)):
        raise ValueError(
            f"prime must hold some of {', '.join(PRIME_KEYS)}, got {', '.join(map(str, unknown))}."
        )
    defaults = {"modality": "image", "expander_dims": list(config.expander_dims)}
    prime: dict[str, Any] = dict.fromkeys(PRIME_KEYS) | defaults
    prime |= {key: value for key, value in description.items() if value is not None}
    for key in ("model_args", "pretrained_cfg", "encoder_config", "preparation"):
        _check_mapping(f"prime's {key}", prime[key])
    if not isinstance(prime["architecture"], str | None):
        raise ValueError(
            f"prime's architecture must be the name of a model, got {prime['architecture']!r}."
        )
    modality = prime["modality"]
    if modality not in MODALITIES:
        raise ValueError(f"modality must be one of {', '.join(MODALITIES)}, got {modality!r}.")
    if modality == "image" and prime["architecture"] is None:
        prime["architecture"] = config.architecture.partition(".")[0]
        prime["model_args"] = without_classes(config.model_args)
        prime["pretrained_cfg"] = prime["pretrained_cfg"] or copy.deepcopy(config.pretrained_cfg)
    audio = "encoder_config" if prime["encoder_config"] else "architecture"
    required = {"text": "encoder_config", "audio": audio, "embedding": "num_features"}.get(modality)
    if required is not None and not prime[required]:
        raise ValueError(f"prime must hold {required} for the modality {modality}, got none.")
    widths = read_widths("prime's expander_dims", prime["expander_dims"])
    if list(config.expander_dims)[-1:] != widths[-1:]:
        raise ValueError(
            "both expanders must end in the same width, got expander_dims="
            f"{list(config.expander_dims)} and, of the second branch, {widths}."
        )
    return prime | {"expander_dims": widths}


def without_classes(model_args: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Leave num_classes out of timm's arguments, as encoders have no classifier."""
    return {k: v for k, v in (model_args or {}).items() if k != "num_classes"} or None


def _check_mapping(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name} must map names to values, as a dict, or be None, got {value!r}.")


class VICRegConfig(PreTrainedConfig):
    """Configuration of a `VICRegModel`: a timm backbone, the expander and the loss.

    Args:
        architecture: timm model name, without a pretrained tag.
        model_args: keyword arguments for `timm.create_model`.
        pretrained_cfg: timm's record of input size, mean and std; None takes the registry's.
        expander_dims: widths of the expander's layers, of which the last is the embedding's; a
            string such as "8192-8192-8192" is read too.
        sim_coeff: weight of the invariance term.
        std_coeff: weight of the variance term.
        cov_coeff: weight of the covariance term.
        gamma: standard deviation below which an embedding dimension is penalised.
        eps: added to the variance before the root.
        variance_reduction: "mean" (the authors' code) or "sum" (the paper) over the branches.
        local_weight: share of the local loss in the whole loss, VICRegL's 1 - alpha, from 0 to
            below 1; 0 is VICReg alone.
        local_matches: pairs of cells that the local loss keeps of two global views of an image.
        local_view_matches: pairs of cells that it keeps of a global and a local view.
        local_expander_dims: widths of the expander of the feature map's cells.
        spectrogram: how sound becomes the backbone's images, if it does: fields of
            `SpectrogramSettings`.
        value_range: of images with more than 8 bits, the two values that become black and white.
        weights: "shared" by both branches, or "separate": the second has the same architecture.
        prime: the second branch where it is another one, as `complete_prime` takes it.

    Raises:
        ValueError: a field that cannot be what it is, a name that is nearly a field's, or a second
            branch that cannot be.
    """

    model_type = "vicreg"

    architecture: str = "resnet50"
    model_args: dict[str, Any] | None = None
    pretrained_cfg: dict[str, Any] | None = None
    expander_dims: list[int] | tuple[int, ...] = (8192, 8192, 8192)
    sim_coeff: float | int = 25.0
    std_coeff: float | int = 25.0
    cov_coeff: float | int = 1.0
    gamma: float | int = 1.0
    eps: float = 1e-4
    variance_reduction: str = "mean"
    local_weight: float | int = 0.0
    local_matches: int = 20
    local_view_matches: int = 4
    local_expander_dims: list[int] | tuple[int, ...] = (512, 512, 512)
    spectrogram: dict[str, Any] | None = None
    value_range: list[float] | tuple[float, ...] | None = None
    weights: str = "shared"
    prime: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in kwargs:  # transformers passes on others of its own
            if near := difflib.get_close_matches(name, OWN_FIELDS, n=1, cutoff=0.85):
                raise ValueError(f"{name} is no field of VICRegConfig; did you mean {near[0]}?")
        super().__post_init__(**kwargs)
        self._check_fields()
        if self.prime is not None or self.weights == "separate":
            self.weights = "separate"
            self.prime = complete_prime(self.prime or {}, self)

    def _check_fields(self) -> None:
        if not isinstance(self.architecture, str):
            raise ValueError(
                f"architecture must be the name of a timm model, got {self.architecture!r}."
            )
        for name in ("model_args", "pretrained_cfg", "spectrogram", "prime"):
            _check_mapping(name, getattr(self, name))
        check_number("eps", self.eps, positive=True)
        check_coefficients(**self.loss_settings)
        read_range("value_range", self.value_range)
        if self.weights not in ("shared", "separate"):
            raise ValueError(f"weights must be shared or separate, got {self.weights!r}.")
        for name in ("expander_dims", "local_expander_dims"):
            widths = read_widths(name, getattr(self, name))
            if not isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, widths)
        check_number("local_weight", self.local_weight)
        if self.local_weight >= 1:
            raise ValueError(f"local_weight must be below 1, got {self.local_weight}.")
        for name in ("local_matches", "local_view_matches"):
            if not is_whole(count := getattr(self, name)) or count < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}.")
        if self.local_weight and (self.prime is not None or self.weights == "separate"):
            raise ValueError(
                "local_weight must be 0 with a second branch, as the local loss compares maps of "
                f"one encoder, got {self.local_weight}."
            )

    @property
    def loss_settings(self) -> dict[str, Any]:
        """The arguments of `vicreg_loss` and `multi_view_loss`."""
        return {name: getattr(self, name) for name in LOSS_FIELDS}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read as transformers does, and check also the fields that replace others."""
        loaded = super().from_dict(config_dict, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._check_fields()
        return loaded

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a training checkpoint, a published encoder, or any timm repository."""
        folder = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        found, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if found and found.get("model_type") != cls.model_type:
            shared = ("architecture", "model_args", "pretrained_cfg")
            backbone = {key: found[key] for key in shared if key in found}
            if "architecture" not in found:
                raise ValueError(
                    "a VICRegModel must be in a training checkpoint, a published encoder of timm, "
                    f"or a timm repository, got {found.get('model_type')!r} in "
                    f"{str(pretrained_model_name_or_path)!r}; transformers' own classes load it."
                )
            found = {**backbone, **found.get(NESTED_KEY, {}), "model_type": cls.model_type}
        if folder.is_dir() and not (folder / INDEX_FILE).is_file():
            # stock loaders have saved the encoder anew, and it alone
            found.pop("transformers_weights", None)
        return found, kwargs

    def to_encoder_dict(self, num_features: int, *, include_expander: bool) -> dict[str, Any]:
        """config.json of the published encoder: timm's and TimmWrapperConfig's, ours nested.

        Args:
            num_features: F, width of the pooled output.
            include_expander: whether the index over all weight files is written beside it.
        """
        method = {key: getattr(self, key) for key in METHOD_FIELDS}
        for optional in ("spectrogram", "value_range"):
            if method[optional] is None:
                del method[optional]
        if include_expander:
            method["transformers_weights"] = INDEX_FILE
            if self.prime is not None:
                method |= {key: getattr(self, key) for key in PRIME_FIELDS}
            if self.local_weight:
                method |= {key: getattr(self, key) for key in LOCAL_FIELDS}
        return {
            "architecture": published_name(self.architecture),
            "num_classes": 0,
            "num_features": num_features,
            "pretrained_cfg": self.pretrained_cfg,
            # also if there are none: saved anew by transformers they would be null, which timm
            # does not take
            "model_args": self.model_args or {},
            "model_type": "timm_wrapper",
            "architectures": ["TimmWrapperModel"],
            NESTED_KEY: method,
        }
