"""FSDP2: each process holds a part of every parameter, of its gradient and optimiser state.

A module has its whole parameters only while it computes. accelerate's own `prepare` is not used for
this, as it shards nothing on CPU, and under mixed precision would round the loss itself.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.runtime.distributed import world_size


def shard(model: VICRegModel, device: torch.device) -> None:
    """Leave each process its rows of every parameter, of those that the main process has.

    The blocks of an encoder become whole one after the other, and the rest of the model together.
    Every process must call this.

    Args:
        device: that of the model, which holds no compiled parts.

    Raises:
        ValueError: a parameter has no rows.
    """
    single = [name for name, p in model.named_parameters() if p.ndim == 0]
    if single:
        raise ValueError(
            f"parameters must have a dimension that FSDP can divide, got the number {single[0]}; "
            "train this architecture without FSDP."
        )
    mesh = init_device_mesh(device.type, (world_size(),))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):  # as DDP begins
            dist.broadcast(tensor, src=0)
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # nothing here writes into what the model returns
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)


def _blocks(model: VICRegModel) -> list[nn.Module]:
    """The repeated parts of the encoders, inner ones first.

    They are those in a list or sequence that holds others of their class, unless they are layers.
    """
    found = []
    for branch in model.branches:
        for part in branch.backbone.modules():
            if isinstance(part, (nn.Sequential, nn.ModuleList)):
                number_of = Counter(type(each) for each in part)
                found += [
                    each for each in part if number_of[type(each)] > 1 and any(each.children())
                ]
    return [part for part in dict.fromkeys(reversed(found)) if not isinstance(part, nn.ModuleList)]


def without_weights(model: VICRegModel) -> VICRegModel:
    """A copy of a model, before it is sharded, that has no values of its parameters."""
    empty = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty)


@contextmanager
def filled(twin: VICRegModel, model: VICRegModel) -> Iterator[None]:
    """Give a copy `without_weights` those of the sharded model, and its buffers, for a while.

    Every process must enter.
    """
    state = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in model.state_dict().items()
    }
    twin.load_state_dict(state, assign=True)
    del state
    try:
        yield
    finally:
        twin.load_state_dict(
            {k: v.to("meta") for k, v in twin.named_parameters()}, strict=False, assign=True
        )
