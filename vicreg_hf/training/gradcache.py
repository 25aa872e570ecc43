"""The gradient of a batch whose activations do not fit in memory: GradCache.

The loss is of a batch's statistics, so gradients of its parts do not add up to its own. Instead:

    1. without gradients, each chunk passes the backbone; the representations are kept
    2. expander and loss see the whole batch, and give the gradient of its representations
    3. each chunk passes the backbone again, and takes its part of that gradient further back

Shapes: B images per process, F representation, S side in pixels.

Source: Gao et al. 2021, arXiv:2101.06983.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from vicreg_hf.loss.autograd import VICRegTerms
from vicreg_hf.modeling_vicreg import VICRegModel, VICRegOutput
from vicreg_hf.models.branch import Inputs
from vicreg_hf.runtime.checks import is_whole

RandomState = tuple[Tensor, Tensor | None]
"""Of torch's generator on CPU and of the accelerator's, if there is one."""


def backward_in_chunks(
    model: VICRegModel,
    pixel_values: Tensor,
    pixel_values_prime: Inputs,
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
    backbone is run forward twice: at most half as much work again.

    Args:
        pixel_values: as the model takes them; likewise pixel_values_prime, further_views and
            local_views.
        chunk_size: images of which the backbone holds activations at once, of each view.
        wrapped: what runs the model, if not it itself: DistributedDataParallel reduces gradients
            with the last chunk alone.
        backward: runs the backward pass of the loss; accelerate's scales it under float16.
        autocast: makes the context in which expander and loss run; `wrapped` sees to its own.

    Returns:
        As the model's, without last_hidden_state; nothing in it carries a gradient.

    Raises:
        ValueError: a chunk_size that is no whole number or below 1.
    """
    if not is_whole(chunk_size) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a whole number of at least 1, got {chunk_size!r}.")
    run = model if wrapped is None else wrapped
    names = ["pixel_values", "pixel_values_prime"]
    names += ["pixel_values"] * (len(further_views) + len(local_views))
    views = [
        _split(view, chunk_size)
        for view in (pixel_values, pixel_values_prime, *further_views, *local_views)
    ]
    states, representations = zip(
        *(_represent(run, name, view) for name, view in zip(names, views, strict=True)),
        strict=True,
    )
    y, y_prime, *others = representations
    with autocast():
        output = model.compare(
            y, y_prime, further=others[: len(further_views)], local=others[len(further_views) :]
        )
    expanders = [p for e in _expanders(model) for p in e.parameters() if p.requires_grad]
    expander_grads = _separately(expanders, lambda: backward(cast(Tensor, output.loss)))
    with _unchanged(_backbones(model), pixel_values.device):
        for number, chunks in enumerate(zip(*views, strict=True)):
            last = number == len(views[0]) - 1
            with nullcontext() if last else getattr(run, "no_sync", nullcontext)():
                roots, grads = [], []
                for name, chunk, state, y in zip(
                    names, chunks, states, representations, strict=True
                ):
                    _set_random_state(state[number], pixel_values.device)
                    found = run(**{name: chunk}).pooler_output
                    if found.requires_grad:  # not so of precomputed embeddings
                        roots.append(found)
                        grads.append(y.grad.split(chunk_size)[number])
                if last:  # the expanders' gradients are reduced in this pass too
                    roots, grads = roots + expanders, grads + expander_grads
                torch.autograd.backward(roots, grads)
    embeddings = cast(tuple[Tensor, ...], output.embeddings)
    return VICRegOutput(
        **{name: getattr(output, name).detach() for name in VICRegTerms._fields},
        embeddings=tuple(z.detach() for z in embeddings),
        pooler_output=representations[0].detach(),
    )


def _split(view: Inputs, size: int) -> list[Inputs]:
    """Successive samples, at most `size` at a time."""
    if isinstance(view, Tensor):
        return list(view.split(size))
    parts = {name: values.split(size) for name, values in view.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def _expanders(model: VICRegModel) -> list[nn.Module]:
    return [model.expander] if model.prime is None else [model.expander, model.prime.expander]


def _backbones(model: VICRegModel) -> nn.ModuleList:
    second = [] if model.prime is None else [model.prime.backbone]
    return nn.ModuleList([model.backbone, *second])


@torch.no_grad()
def _represent(
    run: nn.Module, name: str, chunks: Sequence[Inputs]
) -> tuple[list[RandomState], Tensor]:
    """The state of the random numbers before each chunk, and the representations of all."""
    states, representations = [], []
    for chunk in chunks:
        one = chunk if isinstance(chunk, Tensor) else next(iter(chunk.values()))
        states.append(_random_state(one.device))
        representations.append(run(**{name: chunk}).pooler_output)
    torch.clear_autocast_cache()  # weights that were cast here have no gradient
    return states, torch.cat(representations).requires_grad_()


def _separately(parameters: Sequence[nn.Parameter], backward: Callable[[], Any]) -> list[Tensor]:
    """The gradients that a backward pass gives to parameters, without adding them to theirs."""
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    backward()
    grads = [p.grad for p in parameters]
    for p, grad in zip(parameters, before, strict=True):
        p.grad = grad
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


@contextmanager
def _unchanged(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Leave running statistics, other buffers and random numbers as they are now."""
    kept = [buffer.clone() for buffer in module.buffers()]
    accelerators = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng(accelerators, device_type=kind):
        yield
    with torch.no_grad():
        for buffer, value in zip(module.buffers(), kept, strict=True):
            buffer.copy_(value)


def _random_state(device: torch.device) -> RandomState:
    own = torch.get_device_module(device).get_rng_state(device) if device.type != "cpu" else None
    return torch.get_rng_state(), own


def _set_random_state(state: RandomState, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.get_device_module(device).set_rng_state(state[1], device)
