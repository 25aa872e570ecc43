"""The gradient of a batch whose activations do not fit in memory: GradCache.

The loss is of a batch's statistics, so gradients of its parts do not add up to its own. Instead:

    1. without gradients, each chunk passes the backbone; the representations are kept
    2. expander and loss see the whole batch, and give the gradient of its representations
    3. each chunk passes the backbone again, and takes its part of that gradient further back

A local loss needs the feature maps too: they are kept and given their gradient in the same way.

Shapes: B images per process, F representation, S side in pixels, V views.

Source: Gao et al. 2021, arXiv:2101.06983.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from vicreg_hf.loss.autograd import VICRegTerms
from vicreg_hf.modeling_vicreg import VICRegModel, VICRegOutput
from vicreg_hf.models.branch import BranchInput
from vicreg_hf.runtime.checks import is_whole


def backward_in_chunks(
    model: VICRegModel,
    pixel_values: Tensor,
    pixel_values_prime: BranchInput,
    places: Tensor | None = None,
    *,
    chunk_size: int,
    further_views: Sequence[Tensor] = (),
    local_views: Sequence[Tensor] = (),
    wrapped: nn.Module | None = None,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    autocast: Callable[..., AbstractContextManager[Any]] = nullcontext,
) -> VICRegOutput:
    """Compute the loss of two batches of views or more and add its gradient to every parameter's.

    Loss and gradients are those of the model called with the same views, but for batch
    normalisation in the backbone, which normalises each chunk by itself. Running statistics are
    updated once a chunk and view, and dropout takes the same random numbers both times. The
    backbone is run forward twice: at most half as much work again. With a local loss the feature
    maps of all views, and what the local expander makes of them, are in memory together.

    Args:
        pixel_values: as the model takes them; likewise pixel_values_prime, places, further_views
            and local_views.
        chunk_size: images of which the backbone holds activations at once, of each view.
        wrapped: what runs the model, if not it itself: DistributedDataParallel reduces gradients
            with the last chunk alone, FSDP2 with each.
        backward: runs the backward pass of the loss; accelerate's scales it under float16.
        autocast: makes the context in which expander and loss run; `wrapped` sees to its own.

    Returns:
        The model's output, without last_hidden_state; nothing in it carries a gradient.

    Raises:
        ValueError: a chunk_size that is no whole number or below 1.
    """
    if not is_whole(chunk_size) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a whole number of at least 1, got {chunk_size!r}.")
    run = model if wrapped is None else wrapped
    views = [pixel_values, pixel_values_prime, *further_views, *local_views]
    # with shared weights the model gives the feature map of what it takes as the first view
    second = "pixel_values" if model.local_expander is not None else "pixel_values_prime"
    names = [second if number == 1 else "pixel_values" for number in range(len(views))]
    chunks = [_split(view, chunk_size) for view in views]
    device, num_global = pixel_values.device, 2 + len(further_views)
    states, y, maps = zip(*map(partial(_represent, run, device), names, chunks), strict=True)
    with autocast():
        output = model(
            *y[:2], places, further_views=y[2:num_global], local_views=y[num_global:], encoded=True,
            maps=[own for own in maps if own is not None],
        )  # fmt: skip
    heads = nn.ModuleList([b.expander for b in model.branches])
    if model.local_expander is not None:
        heads.append(model.local_expander)
    expanders = [p for p in heads.parameters() if p.requires_grad]
    if isinstance(model, FSDPModule):  # which reduces and adds up gradients in each pass
        expanders, expander_grads = [], []
        backward(output.loss)
    else:
        expander_grads = _separately(expanders, lambda: backward(output.loss))
    with _unchanged(nn.ModuleList([b.backbone for b in model.branches]), device):
        for number in range(len(chunks[0])):
            last = number == len(chunks[0]) - 1
            with nullcontext() if last else getattr(run, "no_sync", nullcontext)():
                roots, grads = [], []
                for name, parts, state, *wholes in zip(names, chunks, states, y, maps, strict=True):
                    _set_random_state(state[number], device)
                    found = run(**{name: parts[number]}, return_features=False)
                    for again, whole in zip(
                        (found.pooler_output, found.feature_map), wholes, strict=True
                    ):
                        # precomputed embeddings have no gradient
                        if whole is not None and again.requires_grad:
                            roots.append(again)
                            grads.append(whole.grad.split(chunk_size)[number])
                if last:  # the expanders' gradients are reduced in this pass too
                    roots, grads = roots + expanders, grads + expander_grads
                torch.autograd.backward(roots, grads)
    fields = {"loss", *VICRegTerms._fields} & output.keys()
    return VICRegOutput(
        **{name: output[name].detach() for name in sorted(fields)},
        terms=output.terms,
        embeddings=tuple(z.detach() for z in output.embeddings),
        pooler_output=y[0].detach(),
    )


def _split(view: BranchInput, size: int) -> list[Any]:
    """Split samples into successive parts of at most `size`."""
    if isinstance(view, Tensor):
        return list(view.split(size))
    parts = {name: values.split(size) for name, values in view.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


@torch.no_grad()
def _represent(
    run: nn.Module, device: torch.device, name: str, chunks: Sequence[Any]
) -> tuple[list[Any], Tensor, Tensor | None]:
    """Encode all chunks, and keep the state of the random numbers before each.

    Returns:
        The states, the representations, and the feature maps where there is a local loss.
    """
    states, representations, maps = [], [], []
    for chunk in chunks:
        states.append(_random_state(device))
        found = run(**{name: chunk}, return_features=False)
        representations.append(found.pooler_output)
        maps += [] if found.feature_map is None else [found.feature_map]
    torch.clear_autocast_cache()  # weights that were cast here have no gradient
    whole = torch.cat(maps).requires_grad_() if maps else None
    return states, torch.cat(representations).requires_grad_(), whole


def _separately(parameters: Sequence[nn.Parameter], backward: Callable[[], Any]) -> list[Tensor]:
    """Return the gradients of a backward pass without adding them to the parameters' own."""
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for p, grad in zip(parameters, before, strict=True):
        p.grad = grad
    return grads


@contextmanager
def _unchanged(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore running statistics, other buffers and random numbers afterwards."""
    kept, state = [buffer.clone() for buffer in module.buffers()], _random_state(device)
    try:
        yield
    finally:
        _set_random_state(state, device)
    with torch.no_grad():
        for buffer, value in zip(module.buffers(), kept, strict=True):
            buffer.copy_(value)


def _random_state(device: torch.device) -> list[Tensor]:
    """Read the state of torch's generator on CPU and, if there is one, of the accelerator's."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)
