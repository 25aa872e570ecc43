"""Encoders of text: transformers' models as tokens in, pooled features out.

Shapes: B texts, T tokens, F features.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING

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

TEXT_PART = "text_config"
"""Where models of text and something else, such as CLIP, keep their text model's configuration."""
NO_DROPPED_LAYERS = ("layerdrop", "encoder_layerdrop")
"""Skipped layers would get no gradient."""


class TextEncoder(nn.Module):
    """A transformers text model whose features are the mean of its tokens' last hidden states.

    Every text model has those, where poolers, class tokens and last tokens differ from model to
    model; and the mean serves sentences at least as well. Padding is left out. Of encoder-decoders
    the encoder is used. Parameters that the features do not depend on, such as a pooler's, are
    frozen.

    Source: Reimers & Gurevych 2019, "Sentence-BERT", arXiv:1908.10084, table 6.
    """

    model: PreTrainedModel
    num_features: int
    """F."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises ValueError for a model that is no text encoder."""
        super().__init__()
        self.model = model
        accepted = set(inspect.signature(self._encoder.forward).parameters)
        probe = torch.tensor([[0, 1], [1, 0]], device=next(model.parameters()).device)
        try:
            if "input_ids" not in accepted:
                raise ValueError(f"it takes {model.main_input_name} and not tokens.")
            self.eval()
            with torch.enable_grad():
                features = self({"input_ids": probe, "attention_mask": torch.ones_like(probe)})
        except Exception as error:
            raise ValueError(
                "a text encoder must give a last_hidden_state of (B, T, F) for input_ids of "
                f"(B, T), and {type(model).__name__} does not: {one_line(error)}"
            ) from error
        self.num_features = features.shape[1]
        freeze_unused(model, features)
        self.train()

    @property
    def _encoder(self) -> nn.Module:
        both = self.model.config.is_encoder_decoder
        return self.model.get_encoder() if both else self.model

    def forward(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Features of texts.

        Args:
            tokens: input_ids and attention_mask, and token_type_ids if there are any, (B, T) each;
                those that the model does not take are left out.

        Returns:
            (B, F) float32.
        """
        encoder = self._encoder
        accepted = inspect.signature(encoder.forward).parameters
        given = {name: value for name, value in tokens.items() if name in accepted}
        hidden = encoder(**given).last_hidden_state.float()
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        if hidden.shape[:2] != mask.shape[:2]:
            raise ValueError(f"hidden states must be one per token, got {tuple(hidden.shape)}.")
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)

    @property
    def loader(self) -> tuple[str, str]:
        """The class of transformers that loads it once saved, and what to call on the result."""
        kind, both = type(self.model.config), self.model.config.is_encoder_decoder
        if kind in MODEL_FOR_TEXT_ENCODING_MAPPING:
            return "AutoModelForTextEncoding", ""
        if kind in MODEL_MAPPING:
            return "AutoModel", ".get_encoder()" if both else ""
        return type(self.model).__name__, ""

    def save(self, directory: str | Path) -> None:
        """Write the model as stock transformers does; see `save_text_encoder`."""
        save_model(self.model, directory)


def create_text_encoder(
    architecture: str, model_args: Mapping[str, Any] | None = None, pretrained: bool = False
) -> TextEncoder:
    """A text encoder of transformers.

    Args:
        architecture: a model type such as bert, or a directory or Hub id, whose configuration is
            taken. Of models of text and images, such as CLIP, it is the text model.
        model_args: fields of the configuration to replace.
        pretrained: take the weights too; else they are random, by torch's generator.

    Raises:
        ValueError: no such model, not one of text, no such field, or weights that are missing.
    """
    config = with_args(open_config(architecture, TEXT_PART), model_args)
    if not pretrained:
        return _random_encoder(config)
    if is_model_type(architecture):
        raise ValueError(
            "pretrained weights must come from a directory or a Hub id, got the model type "
            f"{architecture!r}."
        )
    _without_dropped_layers(config)
    try:
        model, missing = _load(architecture, config)
    except Exception as error:  # loaders raise whatever their files make them
        raise ValueError(
            "pretrained weights must be in a directory or a Hub id that transformers loads, got "
            f"{architecture!r}: {one_line(error)}"
        ) from error
    encoder = TextEncoder(model)
    check_loaded(model, missing, architecture)
    return encoder


def text_encoder_from_config(config: Mapping[str, Any]) -> TextEncoder:
    """A text encoder of random weights, of what `encoder.model.config.to_dict()` describes.

    Raises:
        ValueError: not a configuration of one.
    """
    return _random_encoder(config_from_dict(config))


def _random_encoder(config: PretrainedConfig) -> TextEncoder:
    _without_dropped_layers(config)
    kind, options = _class_of(config)
    try:
        model = kind._from_config(config, dtype=torch.float32, **options)
    except Exception as error:
        raise ValueError(
            f"model_args must make a {kind.__name__} that can be built: {one_line(error)}"
        ) from error
    return TextEncoder(model)


def _load(architecture: str, config: PretrainedConfig) -> tuple[PreTrainedModel, set[str]]:
    """A model with the weights of its files, and the names of those not found there."""
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    kind, no_pooler = _class_of(config)
    whole = open_config(architecture)
    if not hasattr(whole, TEXT_PART):
        loaded: Any = kind.from_pretrained(architecture, config=config, **no_pooler, **options)
        model, found = loaded
        return model, set(found["missing_keys"])
    setattr(whole, TEXT_PART, config)
    loaded = transformers.AutoModel.from_pretrained(architecture, config=whole, **options)
    both, found = loaded
    prefix = "text_model."
    missing = {k.removeprefix(prefix) for k in found["missing_keys"] if k.startswith(prefix)}
    if type(both.text_model) is not kind:
        raise ValueError(f"the text model of {type(both).__name__} is no model of its own.")
    return both.text_model, missing


def _class_of(config: PretrainedConfig) -> tuple[type[PreTrainedModel], dict[str, Any]]:
    """The class of a text model, and what to build it with so that it has no pooler."""
    kind: Any = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None)
    kind = kind or MODEL_MAPPING.get(type(config), None)
    # parts of larger models, such as SiglipTextModel, are not all in AutoModel
    kind = kind or getattr(transformers, type(config).__name__.replace("Config", "Model"), None)
    if not isinstance(kind, type):
        raise ValueError(
            f"architecture must be a text encoder of transformers, got {config.model_type!r}."
        )
    takes = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return kind, {"add_pooling_layer": False} if takes else {}


def _without_dropped_layers(config: PretrainedConfig) -> None:
    for field in NO_DROPPED_LAYERS:
        if hasattr(config, field):
            setattr(config, field, 0.0)
