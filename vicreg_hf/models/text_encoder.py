"""Encoders of text: transformers' models as tokens in, pooled features out.

Shapes: B texts, T tokens, F features.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING

from vicreg_hf.models.transformers_models import TransformersEncoder, open_config

TEXT_PART = "text_config"
"""The field in which models of text and images, such as CLIP, keep the text model's."""
NO_DROPPED_LAYERS = ("layerdrop", "encoder_layerdrop")
"""Fields that are set to 0, as skipped layers would get no gradient."""


class TextEncoder(TransformersEncoder):
    """A transformers text model whose features are the mean of its tokens' last hidden states.

    Every text model has those, where poolers, class tokens and last tokens differ from model to
    model; and the mean serves sentences at least as well. Padding is left out. Of encoder-decoders
    the encoder is used.

    AutoModel and AutoTokenizer load it once saved. Of encoder-decoders take
    `AutoModel.get_encoder()`, or load T5 with AutoModelForTextEncoding, as only its encoder is
    written; text models that have no entry in AutoModel, such as SigLIP's, are loaded by the class
    that config.json names.

    Source: Reimers & Gurevych 2019, "Sentence-BERT", arXiv:1908.10084, table 6.
    """

    rule = "a text encoder must give a last_hidden_state of (B, T, F) for input_ids of (B, T)"
    part = TEXT_PART

    def _probe(self, device: torch.device) -> dict[str, Tensor]:
        if "input_ids" not in inspect.signature(self._encoder.forward).parameters:
            raise ValueError(f"it takes {self.model.main_input_name} and not tokens.")
        tokens = torch.tensor([[0, 1], [1, 0]], device=device)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    @property
    def _encoder(self) -> nn.Module:
        both = self.model.config.is_encoder_decoder
        return self.model.get_encoder() if both else self.model

    def forward(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Encode texts to features.

        Args:
            tokens: input_ids and attention_mask, and token_type_ids if there are any, (B, T) each;
                those that the model does not take are left out.

        Returns:
            (B, F) float32.
        """
        encoder = self._encoder
        accepted = inspect.signature(encoder.forward).parameters
        inputs = {name: value for name, value in tokens.items() if name in accepted}
        hidden = encoder(**inputs).last_hidden_state.float()
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

    @classmethod
    def _prepare(cls, config: PretrainedConfig) -> tuple[Any, dict[str, Any]]:
        """Find the class of a text model, and build it without a pooler."""
        for field in NO_DROPPED_LAYERS:
            if hasattr(config, field):
                setattr(config, field, 0.0)
        kind: Any = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None)
        kind = kind or MODEL_MAPPING.get(type(config), None)
        # parts of larger models, such as SiglipTextModel, are not all in AutoModel
        kind = kind or getattr(transformers, type(config).__name__.replace("Config", "Model"), None)
        if not isinstance(kind, type):
            raise ValueError(
                f"architecture must be a text encoder of transformers, got {config.model_type!r}."
            )
        pools = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
        return kind, {"add_pooling_layer": False} if pools else {}

    @classmethod
    def _load(
        cls, architecture: str, config: PretrainedConfig, kind: Any, options: dict[str, Any]
    ) -> tuple[PreTrainedModel, set[str]]:
        whole = open_config(architecture)
        if not hasattr(whole, TEXT_PART):
            return super()._load(architecture, config, kind, options)
        setattr(whole, TEXT_PART, config)
        both, missing = super()._load(architecture, whole, transformers.AutoModel, {})
        model: Any = both.text_model
        if type(model) is not kind:
            raise ValueError(f"the text model of {type(both).__name__} is no model of its own.")
        prefix = "text_model."
        return model, {name.removeprefix(prefix) for name in missing if name.startswith(prefix)}
