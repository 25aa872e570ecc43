"""The encoders of both branches: timm's, and of the second also those of other modalities.

Shapes: B samples per process, C channels, S side in pixels, T tokens, L audio samples, F
representation, D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vicreg_hf.models.expander import expander
from vicreg_hf.models.text_encoder import text_encoder_from_config
from vicreg_hf.models.timm_models import create_backbone, is_timm, pooled, width_of
from vicreg_hf.models.waveform_encoder import waveform_encoder_from_config

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
