"""Copies of what changes while a run goes on, to be written while it changes further."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PretrainedConfig, PreTrainedModel


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
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        scalars[str(index)] = {}
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                scalars[str(index)][name] = value
    return tensors, {"param_groups": state["param_groups"], "scalars": scalars}


def join_tensors(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """What `split_tensors` has taken apart."""
    state = {int(index): dict(entries) for index, entries in rest["scalars"].items()}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state[int(index)][name] = value
    return {"state": state, "param_groups": rest["param_groups"]}
