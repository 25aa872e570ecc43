"""Stock transformers models as encoders of a second branch.

Shapes: B samples, F features.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vicreg_hf.runtime.checks import one_line


def is_model_type(architecture: str) -> bool:
    """Say whether a name is one of transformers' model types, such as bert, and no directory."""
    return architecture in CONFIG_MAPPING and not Path(architecture).is_dir()


def open_config(architecture: str, part: str | None = None) -> PretrainedConfig:
    """Open the configuration of a model type, a directory or a Hub id.

    Args:
        architecture: its name.
        part: the field that holds the wanted part's own configuration, where a model has several.

    Raises:
        ValueError: there is none.
    """
    try:
        if is_model_type(architecture):
            config = CONFIG_MAPPING[architecture]()
        else:
            config = AutoConfig.from_pretrained(architecture, trust_remote_code=False)
    except Exception as error:  # loaders raise whatever their files make them
        raise ValueError(
            "architecture must be a model type of transformers, a directory or a Hub id that "
            f"holds a model's config.json, got {architecture!r}: {one_line(error)}"
        ) from error
    return (getattr(config, part, None) or config) if part else config


def with_args(config: PretrainedConfig, model_args: Mapping[str, Any] | None) -> PretrainedConfig:
    """Replace fields of a configuration, and work out anew whatever follows from them.

    Raises:
        ValueError: a field that it does not have, or a value that it refuses.
    """
    aliases = config.attribute_map
    known = config.to_dict()
    args = {aliases.get(name, name): value for name, value in (model_args or {}).items()}
    unknown = [name for name in args if name not in known]
    if unknown:
        raise ValueError(
            f"model_args must be fields of {type(config).__name__}, got {', '.join(unknown)}; "
            f"fields: {', '.join(sorted(known))}."
        )
    try:
        return type(config).from_dict(known | args)
    except Exception as error:
        raise ValueError(
            f"model_args must suit {type(config).__name__}, got {model_args}: {one_line(error)}"
        ) from error


@torch.enable_grad()
def freeze_unused(module: nn.Module, output: Tensor) -> None:
    """Freeze the parameters that an output does not depend on.

    They would get no gradient, which DistributedDataParallel takes for an error.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    grads = torch.autograd.grad(output.sum(), parameters, allow_unused=True)
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.requires_grad_(grad is not None)


class TransformersEncoder(nn.Module):
    """A stock transformers model as an encoder: what its modality takes in, features (B, F) out.

    Parameters that the features do not depend on, such as a pooler's, are frozen.
    """

    rule: ClassVar[str]
    """The rule for models of this kind, as an error states it."""
    part: ClassVar[str | None] = None
    """The field in which models of several modalities keep this one's configuration."""
    model: PreTrainedModel
    num_features: int
    """F."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises ValueError for a model that is no such encoder."""
        super().__init__()
        self.model = model
        self.eval()
        try:
            with torch.enable_grad():
                features = self(self._probe(next(model.parameters()).device))
        except Exception as error:
            raise ValueError(
                f"{self.rule}, and {type(model).__name__} does not: {one_line(error)}"
            ) from error
        self.num_features = features.shape[1]
        freeze_unused(model, features)
        self.train()

    def _probe(self, device: torch.device) -> Any:
        """Make a small input to try the model with."""
        raise NotImplementedError

    @classmethod
    def _prepare(cls, config: PretrainedConfig) -> tuple[Any, dict[str, Any]]:
        """Switch off what training cannot reproduce; return the model's class and its arguments.

        Raises:
            ValueError: no configuration of such an encoder.
        """
        raise NotImplementedError

    @classmethod
    def create(
        cls,
        architecture: str,
        model_args: Mapping[str, Any] | None = None,
        pretrained: bool = False,
    ) -> Self:
        """Create an encoder by its name.

        Args:
            architecture: a model type such as bert or wav2vec2, or a directory or Hub id, whose
                configuration is taken. Of models of text and images, such as CLIP, it is the text
                model.
            model_args: fields of the configuration to replace.
            pretrained: take the weights too; else they are random, by torch's generator.

        Raises:
            ValueError: no such model, one of another modality, no such field, or weights that are
                missing.
        """
        config = with_args(open_config(architecture, cls.part), model_args)
        if not pretrained:
            return cls._random(config)
        if is_model_type(architecture):
            raise ValueError(
                "pretrained weights must come from a directory or a Hub id, got the model type "
                f"{architecture!r}."
            )
        kind, options = cls._prepare(config)
        try:
            model, missing = cls._load(architecture, config, kind, options)
        except Exception as error:  # loaders raise whatever their files make them
            raise ValueError(
                "pretrained weights must be in a directory or a Hub id that transformers loads, "
                f"got {architecture!r}: {one_line(error)}"
            ) from error
        encoder = cls(model)
        used = {name for name, p in model.named_parameters() if p.requires_grad}
        if lacking := sorted(missing & used):
            raise ValueError(
                f"the weights of {architecture!r} must be whole, and {len(lacking)} are missing, "
                f"such as {lacking[0]}; leave out pretrained to start from random ones."
            )
        return encoder

    @classmethod
    def from_config(cls, fields: Mapping[str, Any]) -> Self:
        """Create one with random weights from the fields of `encoder.model.config.to_dict()`.

        Raises:
            ValueError: fields of no such encoder.
        """
        model_type: Any = fields.get("model_type")
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"model_type must be one that transformers knows, got {model_type!r}.")
        return cls._random(CONFIG_MAPPING[model_type].from_dict(dict(fields)))

    @classmethod
    def _random(cls, config: PretrainedConfig) -> Self:
        kind, options = cls._prepare(config)
        try:
            model = kind._from_config(config, dtype=torch.float32, **options)
        except Exception as error:
            raise ValueError(
                f"model_args must make a {kind.__name__} that can be built: {one_line(error)}"
            ) from error
        return cls(model)

    @classmethod
    def _load(
        cls, architecture: str, config: PretrainedConfig, kind: Any, options: dict[str, Any]
    ) -> tuple[PreTrainedModel, set[str]]:
        """Load a model and return the names of the weights that its files lack, too."""
        model, found = kind.from_pretrained(
            architecture, config=config, dtype=torch.float32, output_loading_info=True, **options
        )
        return model, set(found["missing_keys"])

    def save(self, directory: str | Path, processor: Any) -> None:
        """Write the model, with weights in float32, and its processor as stock files."""
        model: Any = copy.deepcopy(self.model)
        model.to("cpu", torch.float32).save_pretrained(directory)
        processor.save_pretrained(directory)
