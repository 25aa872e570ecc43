"""FSDP2: each process holds a part of every parameter, of its gradient and optimiser state.

A module has its whole parameters only while it computes. accelerate's own `prepare` is not used for
this, as it shards nothing on CPU, and under mixed precision would round the loss itself.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vicreg_hf.modeling_vicreg import VICRegModel


def shard(model: VICRegModel, accelerator: Accelerator) -> None:
    """Leave each process its part of the parameters, those of the main process.

    The blocks of an encoder are whole one after the other, and the rest of the model together. The
    forward pass runs under autocast. Every process must call this.

    Raises:
        ValueError: a parameter is a single number, which cannot be shared out.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):  # as DDP begins
            dist.broadcast(tensor, src=0)
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if accelerator.native_amp:
        model.forward = convert_outputs_to_fp32(accelerator.autocast()(model.forward))


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
