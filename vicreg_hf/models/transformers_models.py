"""Stock transformers models as encoders: their configuration, weights, unused parts and files."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vicreg_hf.runtime.checks import one_line


def is_model_type(architecture: str) -> bool:
    """Whether a name is one of transformers' model types, such as bert, and no directory."""
    return architecture in CONFIG_MAPPING and not Path(architecture).is_dir()


def open_config(architecture: str, part: str | None = None) -> PretrainedConfig:
    """The configuration of a model type, a directory or a Hub id.

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
    """A configuration with some fields replaced, and whatever follows from those worked out anew.

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


def config_from_dict(fields: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration that `config.to_dict()` describes.

    Raises:
        ValueError: no model type of transformers.
    """
    kind: Any = fields.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"model_type must be one that transformers knows, got {kind!r}.")
    return CONFIG_MAPPING[kind].from_dict(dict(fields))


def freeze_unused(module: nn.Module, output: Tensor) -> None:
    """Freeze the parameters that an output does not depend on.

    They would get no gradient, which DistributedDataParallel takes for an error. The graph behind
    the output is walked as it does that.
    """
    reached: set[int] = set()
    seen: set[Any] = set()
    pending: list[Any] = [output.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # a leaf
            reached.add(id(node.variable))
        pending += [following for following, _ in node.next_functions]
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in reached)


def check_loaded(module: nn.Module, missing: set[str], architecture: str) -> None:
    """Refuse a model whose weights were not all in its files.

    Args:
        module: with unused parameters frozen.
        missing: names of parameters that the files lack.

    Raises:
        ValueError: some of them are in use.
    """
    used = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    lacking = sorted(missing & used)
    if lacking:
        raise ValueError(
            f"the weights of {architecture!r} must be whole, and {len(lacking)} are missing, such "
            f"as {lacking[0]}; leave out pretrained to start from random ones."
        )


def save_model(model: PreTrainedModel, directory: str | Path) -> None:
    """Write config.json and model.safetensors, in float32."""
    model = copy.deepcopy(model).to("cpu", torch.float32)  # pyright: ignore[reportArgumentType]
    model.save_pretrained(directory)
