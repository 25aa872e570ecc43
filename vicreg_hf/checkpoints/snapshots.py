"""Copies of what changes while a run goes on, to be written while it changes further."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PretrainedConfig, PreTrainedModel

GROUP = "group"
"""What a parameter group's tensors are named by, with its number; others have a parameter's."""


@dataclass
class Snapshot:
    """Copies of all that training changes, which it does not change any more."""

    config: PretrainedConfig
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    """Of the optimiser's state."""
    rest: dict[str, Any]
    """What else its state is."""
    probe: dict[str, Tensor]
    """Empty where the run has none."""


def take_snapshot(
    model: PreTrainedModel,
    optimizer: Optimizer,
    reuse: Snapshot | None = None,
    probe: Mapping[str, Tensor] | None = None,
) -> Snapshot:
    """Copy weights, optimiser state and the probe's to the CPU.

    Args:
        reuse: a snapshot nobody needs any more, into whose memory to copy.
    """
    tensors, rest = split_tensors(optimizer.state_dict())
    weights = model.state_dict()
    snapshot = Snapshot(
        model.config,
        _copies(weights, {} if reuse is None else reuse.weights),
        _copies(tensors, {} if reuse is None else reuse.tensors),
        rest,
        _copies(probe or {}, {} if reuse is None else reuse.probe),
    )
    if any(value.is_cuda for value in weights.values()):
        torch.cuda.synchronize()
    return snapshot


def _copies(tensors: Mapping[str, Tensor], reuse: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the CPU's memory; those from a GPU are complete once it is synchronised."""
    copies = {}
    for name, value in tensors.items():
        copy = reuse.get(name)
        if copy is None or copy.shape != value.shape or copy.dtype != value.dtype:
            copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        copies[name] = copy.copy_(value.detach(), non_blocking=value.is_cuda)
    return copies


def split_tensors(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state_dict as a flat dict of tensors and JSON for everything else."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    groups = {f"{GROUP}{number}": group for number, group in enumerate(state["param_groups"])}
    for owner, entries in (*state["state"].items(), *groups.items()):
        rest[str(owner)] = {}
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{owner}.{name}"] = value
            else:
                rest[str(owner)][name] = value
    param_groups = [rest.pop(name) for name in groups]
    return tensors, {"param_groups": param_groups, "scalars": rest}


def join_tensors(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """What `split_tensors` has taken apart."""
    state = {int(index): dict(entries) for index, entries in rest["scalars"].items()}
    groups = [dict(group) for group in rest["param_groups"]]
    for key, value in tensors.items():
        owner, name = key.split(".", 1)
        if owner.startswith(GROUP):
            groups[int(owner.removeprefix(GROUP))][name] = value
        else:
            state[int(owner)][name] = value
    return {"state": state, "param_groups": groups}
