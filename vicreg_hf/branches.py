"""The encoders of both branches: timm's, and of the second also those of other modalities.

Shapes: B samples per process, C channels, S side in pixels, T tokens, L audio samples, F
representation, D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vicreg_hf.expander import expander
from vicreg_hf.modalities.text_encoder import text_encoder_from_config
from vicreg_hf.modalities.waveform_encoder import waveform_encoder_from_config

Inputs = Tensor | Mapping[str, Tensor]
"""What a branch takes of B samples: (B, C, S, S) views or spectrograms, (B, L) waveforms, (B, F)
precomputed embeddings, or a tokenizer's (B, T) input_ids and attention_mask by name."""


class Branch(nn.Module):
    """An encoder and an expander of its own: the second branch, where it shares no weights.

    Args:
        encoder: gives (B, F) for what it takes, or, of timm, is pooled to that.
        num_features: F.
        expander_dims: widths of the expander's layers.
    """

    def __init__(self, encoder: nn.Module, num_features: int, expander_dims: Sequence[int]) -> None:
        super().__init__()
        self.backbone, self.num_features = encoder, num_features
        self.expander = expander(num_features, expander_dims)

    def represent(self, inputs: Inputs) -> Tensor:
        """The representations (B, F) of what the encoder takes."""
        if is_timm(self.backbone):
            return pooled(self.backbone, inputs)[1]
        return self.backbone(inputs)


def is_timm(encoder: nn.Module) -> bool:
    """Whether an encoder is published in timm's layout."""
    return hasattr(encoder, "forward_head")


def pooled(backbone: Any, pixel_values: Any) -> tuple[Tensor, Tensor]:
    """A timm backbone's feature map or tokens, and the representations (B, F).

    Raises:
        ValueError: a backbone that does not pool.
    """
    features = backbone.forward_features(pixel_values)
    y = backbone.forward_head(features)
    if y.ndim != 2:
        raise ValueError(
            "the backbone must pool to shape (batch, features), got "
            f"{tuple(y.shape)}; remove global_pool from model_args."
        )
    return features, y


def width_of(backbone: Any) -> int:
    """F of a timm backbone: after pooling and any head layer, which num_features is not."""
    return int(backbone.head_hidden_size)


def create_prime_encoder(prime: Mapping[str, Any]) -> nn.Module:
    """The second branch's encoder with random weights, from what `complete_prime` gives.

    Raises:
        ValueError: an architecture or arguments that cannot be.
    """
    if prime["modality"] == "embedding":
        return nn.Identity()
    if prime["encoder_config"] is None:
        return create_backbone(prime["architecture"], prime["model_args"] or {})
    text = prime["modality"] == "text"
    create = text_encoder_from_config if text else waveform_encoder_from_config
    # they try themselves out, which from_pretrained's meta device does not allow
    with torch.device("cpu"):
        encoder = create(prime["encoder_config"])
    for module in encoder.modules():  # else from_pretrained leaves buffers without values
        module.__dict__.pop("_is_hf_initialized", None)
    return encoder


def create_branch(prime: Mapping[str, Any], encoder: nn.Module | None = None) -> Branch:
    """The second branch.

    Args:
        prime: as `complete_prime` gives it.
        encoder: instead of one with random weights.
    """
    encoder = create_prime_encoder(prime) if encoder is None else encoder
    if prime["modality"] == "embedding":
        width = prime["num_features"]
    else:
        width = width_of(encoder) if is_timm(encoder) else encoder.num_features
    return Branch(encoder, int(width), prime["expander_dims"])  # pyright: ignore[reportArgumentType]


def check_architecture(name: str, setting: str = "architecture") -> str:
    """Return a timm architecture's name without its tag, or say which names come close.

    Args:
        setting: what the sentence calls it.

    Raises:
        ValueError: timm has no such model.
    """
    base = name.partition(".")[0]
    if timm.is_model(base):
        return base
    near = get_close_matches(base, timm.list_models(), n=4, cutoff=0.5)
    hint = f"close to it are {', '.join(near)}" if near else "timm.list_models() lists them"
    raise ValueError(f"{setting} must be a timm model, got {name!r}; {hint}.")


def create_backbone(
    name: str, model_args: Mapping[str, Any], *, pretrained: bool = False
) -> nn.Module:
    """A timm model without a classifier.

    Raises:
        ValueError: arguments that timm refuses, or weights that are not to be had.
    """
    try:
        return timm.create_model(name, pretrained=pretrained, **{**model_args, "num_classes": 0})
    except TypeError as error:
        raise ValueError(
            f"model_args must be arguments of timm's {name}, got {dict(model_args)}: {error}."
        ) from error
    except (RuntimeError, AssertionError, OSError) as error:
        if pretrained and isinstance(error, OSError):
            raise ValueError(
                f"pretrained weights of {name} must be on the Hub, and that in reach, or in its "
                f"cache, or start from random ones; {' '.join(str(error).split())}"
            ) from error
        weights = "with pretrained weights " if pretrained else ""
        raise ValueError(
            f"timm must be able to build {name} {weights}from model_args, got {dict(model_args)}: "
            f"{' '.join(str(error).split())}"
        ) from error
