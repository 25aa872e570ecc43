"""What an optimiser is given: groups of parameters by layer, and arguments of a user."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.runtime.checks import is_number, one_line

ELSEWHERE = {"lr": "base_lr", "weight_decay": "weight_decay"}
"""Arguments of optimisers that are settings of the run, by the name of the setting."""


def layer_groups(
    model: VICRegModel, *, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups of timm's, each with its share of the learning rate in `lr_scale`.

    Either branch has its own layers: 1 is the share of its expander, which stands where timm's
    models have a classifier, and each layer below has layer_decay times that of the one above.
    Frozen parameters are in no group.
    """
    groups: list[dict[str, Any]] = []
    for branch in model.branches:
        heads: dict[str, nn.Module] = {"expander": branch.expander}
        if branch is model and model.local_expander is not None:
            heads["local_expander"] = model.local_expander
        layers: Any = _Layers(branch.backbone, heads)
        if any(True for _ in branch.backbone.parameters()):
            groups += param_groups_layer_decay(
                layers, weight_decay=weight_decay, layer_decay=layer_decay
            )
        else:  # precomputed embeddings
            groups += param_groups_weight_decay(layers, weight_decay)
    return groups


class _Layers:
    """An encoder and its expanders as timm looks through a model with a classifier."""

    def __init__(self, encoder: Any, heads: Mapping[str, nn.Module]) -> None:
        self.encoder, self.heads = encoder, heads

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.encoder.named_parameters()
        for name, head in self.heads.items():
            yield from head.named_parameters(name)

    def group_matcher(self, coarse: bool = False) -> Any:
        """Say how names become ordinals of layers; those of no layer are above all others."""
        if hasattr(self.encoder, "group_matcher"):
            return self.encoder.group_matcher(coarse=coarse)
        ordinals = _numbered_layers(self.encoder)
        return lambda name: ordinals.get(name, math.inf)


def _numbered_layers(encoder: nn.Module) -> dict[str, int]:
    """Ordinals of the parameters of any encoder, of transformers say: another for each number.

    What stands before the first numbered module is the lowest layer; what stands behind another
    belongs to it.
    """
    ordinals: dict[str, int] = {}
    blocks: dict[str, int] = {}
    for name, _ in encoder.named_parameters():
        if block := re.match(r"(.*?\.)?\d+\.", name):
            blocks.setdefault(block[0], len(blocks) + 1)
            ordinals[name] = blocks[block[0]]
        else:
            ordinals[name] = len(blocks)
    return ordinals


def check_optimizer_args(name: str, kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an optimiser that a user gives, with tuples where it has them.

    Args:
        name: of the optimiser, for messages.
        kind: its class, whose signature says which arguments it takes.

    Raises:
        ValueError: it has no such argument, or takes another type there, or a setting says that.
    """
    if said := [f"--{ELSEWHERE[key]} in place of {key}" for key in given if key in ELSEWHERE]:
        raise ValueError(
            "optimizer_args must leave out what has a flag of its own, got "
            f"{dict(given)}; use {' and '.join(said)}."
        )
    own = {
        key: parameter.default
        for key, parameter in inspect.signature(kind).parameters.items()
        if key not in {"params", *ELSEWHERE} and parameter.default is not parameter.empty
    }
    checked: dict[str, Any] = {}
    for key, value in given.items():
        if key not in own:
            raise ValueError(
                f"optimizer_args must be arguments of {name}, got {key!r}; it has {', '.join(own)}."
            )
        checked[key] = tuple(value) if isinstance(value, list) else value
        if (rule := _expected(own[key])) and not _alike(checked[key], own[key]):
            raise ValueError(f"{key} of optimizer_args must be {rule} for {name}, got {value!r}.")
    return checked


def _expected(default: Any) -> str | None:
    """Words for the values that may stand in for a default, None where any may."""
    if isinstance(default, bool):
        return "true or false"
    if isinstance(default, (tuple, list)):
        return f"a list of {len(default)} numbers"
    return "a number" if isinstance(default, (int, float)) else None


def _alike(value: Any, default: Any) -> bool:
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, (tuple, list)):
        return (
            isinstance(value, tuple) and len(value) == len(default) and all(map(is_number, value))
        )
    return is_number(value)


def made(kind: Any, name: str, given: Mapping[str, Any], **settings: Any) -> Any:
    """Call what makes an optimiser, and blame values that it refuses on optimizer_args.

    Raises:
        ValueError: it refuses them.
    """
    try:
        optimizer = kind(**settings, **given)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        if not given:
            raise
        raise ValueError(
            f"optimizer_args must be values that {name} takes, got {dict(given)}: {one_line(error)}"
        ) from error
    for key, value in given.items():
        if optimizer.defaults.get(key, value) != value:
            raise ValueError(f"optimizer_args must leave out {key}, which timm keeps for {name}.")
    return optimizer
