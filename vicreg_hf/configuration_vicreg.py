"""VICRegConfig, and the config.json that every stock loader reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from timm.models import filter_pretrained_cfg
from transformers import PreTrainedConfig

from vicreg_hf.backbones import published_name

INDEX_FILE = "vicreg.safetensors.index.json"
NESTED_KEY = "vicreg"
METHOD_FIELDS = (
    "expander_dims", "sim_coeff", "std_coeff", "cov_coeff", "gamma", "eps", "variance_reduction",
)  # fmt: skip

# Facts about the weights a timm registry entry was made for; those published here are others.
_PROVENANCE = (
    "tag", "origin_url", "paper_ids", "paper_name", "license", "notes", "description",
    "label_offset", "label_names", "label_descriptions", "architecture", "min_input_size",
    "test_input_size", "test_crop_pct", "test_pool_size",
)  # fmt: skip


def encoder_pretrained_cfg(
    registry: Mapping[str, Any], model_args: Mapping[str, Any], image_size: int | None = None
) -> dict[str, Any]:
    """The `pretrained_cfg` of a published encoder: what timm and AutoImageProcessor need.

    Args:
        registry: the backbone's own pretrained_cfg.
        model_args: keyword arguments the backbone was built with.
        image_size: side in pixels of the training views; None takes the backbone's own.
    """
    cfg = filter_pretrained_cfg(dict(registry), remove_source=True, remove_null=True)
    cfg = {key: value for key, value in cfg.items() if key not in _PROVENANCE}
    channels, height, width = cfg["input_size"]
    size = model_args.get("img_size", image_size or (height, width))
    height, width = (size, size) if isinstance(size, int) else size
    channels = model_args.get("in_chans", channels)
    cfg |= {
        "num_classes": 0,
        "custom_load": False,
        "pool_size": None,
        "input_size": (channels, height, width),
    }
    for key in ("mean", "std"):  # AutoImageProcessor wants one value per input channel
        if len(cfg[key]) != channels:
            cfg[key] = [sum(cfg[key]) / len(cfg[key])] * channels
    return json.loads(json.dumps(cfg))  # tuples become lists, as they will when read back


@strict
class VICRegConfig(PreTrainedConfig):
    """Configuration of a `VICRegModel`: a timm backbone, the expander and the loss.

    Args:
        architecture: timm model name, without a pretrained tag.
        model_args: keyword arguments for `timm.create_model`.
        pretrained_cfg: timm's record of input size, mean and std; None takes the registry's.
        expander_dims: widths of the expander's layers, the last being the embedding's.
        sim_coeff: weight of the invariance term.
        std_coeff: weight of the variance term.
        cov_coeff: weight of the covariance term.
        gamma: standard deviation asked of every embedding dimension.
        eps: added to the variance before the root.
        variance_reduction: "mean" (the authors' code) or "sum" (the paper) over the branches.
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

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a training checkpoint, a published encoder, or any timm repository."""
        found, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if found and found.get("model_type") != cls.model_type:
            shared = ("architecture", "model_args", "pretrained_cfg")
            backbone = {key: found[key] for key in shared if key in found}
            found = {**backbone, **found.get(NESTED_KEY, {}), "model_type": cls.model_type}
        return found, kwargs

    def to_encoder_dict(self, num_features: int, *, include_expander: bool) -> dict[str, Any]:
        """config.json of the published encoder: timm's and TimmWrapperConfig's, ours nested.

        Args:
            num_features: F, width of the pooled output.
            include_expander: whether the index over both weight files is written beside it.
        """
        method = {key: getattr(self, key) for key in METHOD_FIELDS}
        if include_expander:
            method["transformers_weights"] = INDEX_FILE
        config = {
            "architecture": published_name(self.architecture),
            "num_classes": 0,
            "num_features": num_features,
            "pretrained_cfg": self.pretrained_cfg,
            "model_type": "timm_wrapper",
            "architectures": ["TimmWrapperModel"],
            NESTED_KEY: method,
        }
        if self.model_args:
            config["model_args"] = self.model_args
        return config
