"""VICRegConfig, and the config.json that every stock loader reads."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from vicreg_hf.models.resnets import published_name
from vicreg_hf.runtime.checks import check_number, read_widths

INDEX_FILE = "vicreg.safetensors.index.json"
NESTED_KEY = "vicreg"
METHOD_FIELDS = (
    "expander_dims", "sim_coeff", "std_coeff", "cov_coeff", "gamma", "eps", "variance_reduction",
    "spectrogram",
)  # fmt: skip
PRIME_FIELDS = ("weights", "prime")
"""Said of a published model only where the weights of its second branch are published too."""
MODALITIES = ("image", "text", "audio", "embedding")
"""What a branch may take: pixels or spectrograms, token ids, waveforms, precomputed vectors."""
OWN_FIELDS = (
    "architecture", "model_args", "pretrained_cfg", *METHOD_FIELDS, "weights", "prime",
)  # fmt: skip
"""Beside these a config holds whatever transformers keeps in one."""


def complete_prime(given: Mapping[str, Any], config: VICRegConfig) -> dict[str, Any]:
    """The description of a second branch with everything in it that the first one settles.

    Args:
        given: some of
            modality: one of `MODALITIES`, by default image.
            architecture: timm model, of images and of audio as spectrograms; by default the
                first branch's, with its model_args. Of text and of audio as waveforms a model type
                of transformers, which encoder_config settles.
            model_args: keyword arguments for `timm.create_model`; likewise pretrained_cfg, as of
                the first branch.
            encoder_config: of a transformers model, all of it.
            preparation: of text max_length in tokens, of waveforms sampling_rate and seconds, of
                spectrograms the fields of `SpectrogramSettings`.
            num_features: width of precomputed embeddings.
            expander_dims: widths of the second expander; by default the first's.
        config: of the first branch.

    Raises:
        ValueError: an unknown field or modality, expanders that end in different widths, a field
            that the modality needs and lacks, or one that is not what it must be.
    """
    _check_mapping("prime", given)
    prime: dict[str, Any] = {
        "modality": "image", "architecture": None, "model_args": None, "pretrained_cfg": None,
        "encoder_config": None, "preparation": None, "num_features": None,
        "expander_dims": list(config.expander_dims),
    }  # fmt: skip
    unknown = sorted(given.keys() - prime.keys())
    if unknown:
        raise ValueError(
            f"prime must hold some of {', '.join(prime)}, got {', '.join(map(str, unknown))}."
        )
    prime |= {key: value for key, value in given.items() if value is not None}
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
        own = {k: v for k, v in (config.model_args or {}).items() if k != "num_classes"}
        prime |= {
            "architecture": config.architecture.partition(".")[0], "model_args": own or None,
            "pretrained_cfg": prime["pretrained_cfg"] or copy.deepcopy(config.pretrained_cfg),
        }  # fmt: skip
    needed = {"text": "encoder_config", "embedding": "num_features"}.get(modality)
    if modality == "audio" and prime["encoder_config"] is None:
        needed = "architecture"
    if needed is not None and not prime[needed]:
        raise ValueError(f"prime must hold {needed} for the modality {modality}, got none.")
    widths = read_widths("prime's expander_dims", prime["expander_dims"])
    last, own = (list(dims)[-1:] for dims in (config.expander_dims, widths))
    if last != own:
        raise ValueError(
            "both expanders must end in the same width, got expander_dims="
            f"{list(config.expander_dims)} and, of the second branch, {widths}."
        )
    return prime | {"expander_dims": widths}


def _check_mapping(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name} must map names to values, as a dict, or be None, got {value!r}.")


@strict
class VICRegConfig(PreTrainedConfig):
    """Configuration of a `VICRegModel`: a timm backbone, the expander and the loss.

    Args:
        architecture: timm model name, without a pretrained tag.
        model_args: keyword arguments for `timm.create_model`.
        pretrained_cfg: timm's record of input size, mean and std; None takes the registry's.
        expander_dims: widths of the expander's layers, the last being the embedding's; also joined
            by '-', as "8192-8192-8192".
        sim_coeff: weight of the invariance term.
        std_coeff: weight of the variance term.
        cov_coeff: weight of the covariance term.
        gamma: standard deviation asked of every embedding dimension.
        eps: added to the variance before the root.
        variance_reduction: "mean" (the authors' code) or "sum" (the paper) over the branches.
        spectrogram: how sound becomes the backbone's images, if it does: fields of
            `SpectrogramSettings`.
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
    spectrogram: dict[str, Any] | None = None
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
        for name in ("sim_coeff", "std_coeff", "cov_coeff", "gamma"):
            check_number(name, getattr(self, name))
        check_number("eps", self.eps, positive=True)
        if self.variance_reduction not in ("mean", "sum"):
            raise ValueError(
                f"variance_reduction must be mean or sum, got {self.variance_reduction!r}."
            )
        if self.weights not in ("shared", "separate"):
            raise ValueError(f"weights must be shared or separate, got {self.weights!r}.")
        widths = read_widths("expander_dims", self.expander_dims)
        if not isinstance(self.expander_dims, (list, tuple)):
            self.expander_dims = widths

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As of any configuration; fields that are given beside it are checked too."""
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
        if self.spectrogram is None:
            del method["spectrogram"]
        if include_expander:
            method["transformers_weights"] = INDEX_FILE
            if self.prime is not None:
                method |= {key: getattr(self, key) for key in PRIME_FIELDS}
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
