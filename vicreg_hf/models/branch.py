"""The second branch: an encoder and an expander of its own.

Shapes: B samples per process, C channels, S side in pixels, T tokens, L audio samples, F
representation, D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vicreg_hf.models.expander import expander
from vicreg_hf.models.text_encoder import TextEncoder
from vicreg_hf.models.timm_models import create_backbone, is_timm, pooled, width_of
from vicreg_hf.models.waveform_encoder import WaveformEncoder

BranchInput = Tensor | Mapping[str, Tensor]
"""B samples as a branch takes them: (B, C, S, S) views or spectrograms, (B, L) waveforms, (B, F)
precomputed embeddings, or a tokenizer's (B, T) input_ids and attention_mask by name."""


class Branch(nn.Module):
    """The second branch, where it shares no weights with the first.

    Args:
        prime: its description, as `configuration_vicreg.complete_prime` returns it.
        encoder: the encoder; None creates one with random weights.

    Raises:
        ValueError: an architecture or arguments that cannot be.
    """

    def __init__(self, prime: Mapping[str, Any], encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone: Any = create_encoder(prime) if encoder is None else encoder
        if prime["modality"] == "embedding":
            self.num_features = int(prime["num_features"])
        elif is_timm(self.backbone):
            self.num_features = width_of(self.backbone)
        else:
            self.num_features = self.backbone.num_features
        self.expander = expander(self.num_features, prime["expander_dims"])

    def represent(self, inputs: BranchInput) -> Tensor:
        """Encode samples to their representations (B, F)."""
        if is_timm(self.backbone):
            return pooled(self.backbone, inputs)[1]
        return self.backbone(inputs)


def create_encoder(prime: Mapping[str, Any]) -> nn.Module:
    """Create the encoder of a second branch with random weights; see `Branch`."""
    if prime["modality"] == "embedding":
        return nn.Identity()
    if prime["encoder_config"] is None:
        return create_backbone(prime["architecture"], prime["model_args"] or {})
    kind = TextEncoder if prime["modality"] == "text" else WaveformEncoder
    # They try themselves out, which the meta device of from_pretrained does not allow.
    with torch.device("cpu"):
        encoder = kind.from_config(prime["encoder_config"])
    for module in encoder.modules():  # else from_pretrained leaves buffers without values
        module.__dict__.pop("_is_hf_initialized", None)
    return encoder
