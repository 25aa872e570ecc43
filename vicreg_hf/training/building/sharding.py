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
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.runtime.distributed import rank, world_size


def shard(model: VICRegModel, device: torch.device) -> None:
    """Keep in each process only its rows of the main process's parameters.

    The blocks of an encoder become whole one after the other, and the rest of the model together. A
    loss of one's own keeps its parameters whole. Every process must call this.

    Args:
        device: that of the model, which holds no compiled parts.

    Raises:
        ValueError: a parameter has no rows.
    """
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):  # as DDP begins
            dist.broadcast(tensor, src=0)
    loss, model.loss = model.loss, None
    single = [name for name, p in model.named_parameters() if p.ndim == 0]
    if single:
        raise ValueError(
            f"parameters must have a dimension that FSDP can divide, got {single[0]}, "
            "which has no dimensions; train this architecture without FSDP."
        )
    mesh = init_device_mesh(device.type, (world_size(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.loss = loss
    # nothing here writes into what the model returns
    warnings.filterwarnings(
        "ignore", rf"FSDP2-wrapped module \(.*{VICRegModel.__name__}\) returned a view", UserWarning
    )


def _blocks(model: VICRegModel) -> list[nn.Module]:
    """The repeated parts of the encoders, inner ones first.

    They are modules with children, in a list or sequence that holds others of their class.
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
def filled(
    twin: VICRegModel, model: VICRegModel, *, main_process_only: bool = False
) -> Iterator[None]:
    """Give a copy `without_weights` the weights of the sharded model, and its buffers, for a while.

    Every process must enter.

    Args:
        main_process_only: the copies of other processes stay as they are, and take no memory.
    """
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value.clone()
        if rank() == 0 or not main_process_only:
            state[name] = whole
    if state:
        twin.load_state_dict(state, assign=True)
    del state
    try:
        yield
    finally:
        twin.load_state_dict(
            {k: v.to("meta") for k, v in twin.named_parameters()}, strict=False, assign=True
        )
