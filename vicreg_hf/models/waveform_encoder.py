"""Encoders of sound: transformers' models as waveforms in, pooled features out.

Shapes: B clips, L samples, F features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, Wav2Vec2FeatureExtractor
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from vicreg_hf.models.transformers_models import TransformersEncoder

UNKEYED = {"apply_spec_augment": False, "layerdrop": 0.0}
"""SpecAugment draws from numpy's global state, which no key reproduces; and layers that are dropped
would get no gradient. Both are off, in the configuration too."""


class WaveformEncoder(TransformersEncoder):
    """A transformers audio model whose features are the mean over time of its last hidden states.

    For models that take raw waveforms as input_values: wav2vec2, HuBERT, WavLM, data2vec-audio and
    their kin. AutoModel and AutoFeatureExtractor load it once saved.
    """

    rule = (
        "an encoder of waveforms must give a last_hidden_state of (B, T, F) for input_values of "
        "(B, L)"
    )

    @property
    def min_samples(self) -> int:
        """The receptive field in samples: shorter clips have no features."""
        return _receptive_field(self.model.config)

    def _probe(self, device: torch.device) -> Tensor:
        return torch.linspace(-1, 1, 4 * self.min_samples, device=device).repeat(2, 1)

    def forward(self, waveforms: Tensor) -> Tensor:
        """Encode clips to features.

        Args:
            waveforms: (B, L), each of zero mean and unit variance.

        Returns:
            (B, F) float32.

        Raises:
            ValueError: clips shorter than the receptive field.
        """
        if waveforms.shape[-1] < self.min_samples:
            raise ValueError(
                f"a waveform must have at least {self.min_samples} samples, the receptive field of "
                f"{type(self.model).__name__}, got {waveforms.shape[-1]}; take longer clips."
            )
        hidden = self.model(input_values=waveforms).last_hidden_state
        return hidden.float().mean(1)

    @classmethod
    def _prepare(cls, config: PretrainedConfig) -> tuple[Any, dict[str, Any]]:
        _receptive_field(config)
        for field, value in UNKEYED.items():
            setattr(config, field, value)
        kind = MODEL_MAPPING.get(type(config), None)
        if not isinstance(kind, type):
            raise ValueError(
                f"architecture must be a model that AutoModel builds, got {config.model_type!r}."
            )
        return kind, {}


def save_waveform_encoder(
    encoder: WaveformEncoder, sampling_rate: int, directory: str | Path
) -> None:
    """Write an encoder and its feature extractor as stock files.

    Args:
        sampling_rate: samples per second that it was trained on.
    """
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=sampling_rate, do_normalize=True)
    encoder.save(directory, extractor)


def _receptive_field(config: PretrainedConfig) -> int:
    kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
    if kernels is None or strides is None:
        raise ValueError(
            "architecture must be an encoder of raw waveforms, such as wav2vec2, hubert, wavlm or "
            f"data2vec-audio, got {config.model_type!r}."
        )
    samples = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples
