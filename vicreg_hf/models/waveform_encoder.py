"""Encoders of sound: transformers' models as waveforms in, pooled features out.

Shapes: B clips, L samples, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, Wav2Vec2FeatureExtractor
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from vicreg_hf.models.transformers_models import (
    check_loaded,
    config_from_dict,
    freeze_unused,
    is_model_type,
    open_config,
    save_model,
    with_args,
)
from vicreg_hf.runtime.checks import one_line

UNKEYED = {"apply_spec_augment": False, "layerdrop": 0.0}
"""SpecAugment draws from numpy's global state, which no key reproduces; and layers that are dropped
would get no gradient."""


class WaveformEncoder(nn.Module):
    """A transformers audio model whose features are the mean over time of its last hidden states.

    For models that take raw waveforms as input_values: wav2vec2, HuBERT, WavLM, data2vec-audio and
    their kin. Parameters that the features do not depend on, such as SpecAugment's mask, are
    frozen.
    """

    model: PreTrainedModel
    num_features: int
    """F."""
    min_samples: int
    """The receptive field: shorter clips have no features."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises ValueError for a model that is no encoder of waveforms."""
        super().__init__()
        self.model = model
        self.min_samples = _receptive_field(model.config)
        device = next(model.parameters()).device
        probe = torch.linspace(-1, 1, 4 * self.min_samples, device=device).repeat(2, 1)
        self.eval()
        try:
            with torch.enable_grad():
                features = self(probe)
        except Exception as error:
            raise ValueError(
                "an encoder of waveforms must give a last_hidden_state of (B, T, F) for "
                f"input_values of (B, L), and {type(model).__name__} does not: {one_line(error)}"
            ) from error
        self.num_features = features.shape[1]
        freeze_unused(model, features)
        self.train()

    def forward(self, waveforms: Tensor) -> Tensor:
        """Features of clips.

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


def create_waveform_encoder(
    architecture: str, model_args: Mapping[str, Any] | None = None, pretrained: bool = False
) -> WaveformEncoder:
    """An encoder of waveforms of transformers.

    Its SpecAugment and LayerDrop are off, see `UNKEYED`, in its configuration too.

    Args:
        architecture: a model type such as wav2vec2, or a directory or Hub id, whose configuration
            is taken.
        model_args: fields of the configuration to replace.
        pretrained: take the weights too; else they are random, by torch's generator.

    Raises:
        ValueError: no such model, not one of waveforms, no such field, or weights that are missing.
    """
    config = with_args(open_config(architecture), model_args)
    if not pretrained:
        return _random_encoder(config)
    if is_model_type(architecture):
        raise ValueError(
            "pretrained weights must come from a directory or a Hub id, got the model type "
            f"{architecture!r}."
        )
    kind = _class_of(config)
    try:
        loaded: Any = kind.from_pretrained(
            architecture, config=config, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # loaders raise whatever their files make them
        raise ValueError(
            "pretrained weights must be in a directory or a Hub id that transformers loads, got "
            f"{architecture!r}: {one_line(error)}"
        ) from error
    model, found = loaded
    encoder = WaveformEncoder(model)
    check_loaded(model, set(found["missing_keys"]), architecture)
    return encoder


def waveform_encoder_from_config(config: Mapping[str, Any]) -> WaveformEncoder:
    """One of random weights, of what `encoder.model.config.to_dict()` describes.

    Raises:
        ValueError: not a configuration of one.
    """
    return _random_encoder(config_from_dict(config))


def save_waveform_encoder(
    encoder: WaveformEncoder, sampling_rate: int, directory: str | Path
) -> None:
    """Write an encoder as stock transformers does, weights in float32.

    AutoModel and AutoFeatureExtractor load it, and the mean of last_hidden_state over time is this
    encoder's output.

    Args:
        sampling_rate: samples per second that it was trained on.
    """
    save_model(encoder.model, directory)
    Wav2Vec2FeatureExtractor(sampling_rate=sampling_rate, do_normalize=True).save_pretrained(
        directory
    )


def _random_encoder(config: PretrainedConfig) -> WaveformEncoder:
    kind = _class_of(config)
    try:
        model = kind._from_config(config, dtype=torch.float32)
    except Exception as error:
        raise ValueError(
            f"model_args must make a {kind.__name__} that can be built: {one_line(error)}"
        ) from error
    return WaveformEncoder(model)


def _class_of(config: PretrainedConfig) -> Any:
    """The class of a configuration's model; the configuration is set to draw nothing."""
    _receptive_field(config)
    for field, value in UNKEYED.items():
        setattr(config, field, value)
    kind = MODEL_MAPPING.get(type(config), None)
    if not isinstance(kind, type):
        raise ValueError(
            f"architecture must be a model that AutoModel builds, got {config.model_type!r}."
        )
    return kind
