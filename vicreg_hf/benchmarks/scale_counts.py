"""What a training step has to do: arithmetic, traffic of memory, kernels and bytes to send.

The model's share is counted while it runs on the meta device, where nothing is computed; the loss
has formulas, which tests compare with what is counted while it runs.

Shapes: n rows in this process, N in all, W processes, D dimensions, K = `LEADING`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vicreg_hf.configuration_vicreg import VICRegConfig
from vicreg_hf.loss.covariance import LEADING, prefers_gram
from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.training.building.optimizers import create_optimizer

FLOAT32 = 4
"""Bytes of what the loss computes in, of a weight and of its gradient."""
COUNTED_IMAGES = 2
"""A batch that batch normalisation takes."""
# Elements that one branch of a loss reads and writes, forward and backward, fitted to `count` of
# runs with 1, 2 and 8 processes; tests count again.
GRAM_TRAFFIC = {"all rows": 19.6, "own rows": 26.7, "product": 8.5}
COVARIANCE_TRAFFIC = {"own rows": 27.5, "product": 10.0}
AUTHORS_TRAFFIC = {"all rows": 30.7, "own rows": 6.6, "product": 27.0}


class Count(NamedTuple):
    """What ran."""

    flops: int
    """2 for a multiplication with its addition; of matrix products and convolutions alone."""
    kernels: int
    """Operations that are more than a view."""
    traffic: int
    """Bytes that these read and wrote, each by itself, as without a compiler."""


@dataclass(frozen=True)
class Work:
    """The model's share of a step."""

    backbone_flops: int
    """Of one view, forward."""
    backbone_kernels: int
    """Of one forward pass, whatever the batch."""
    expander_flops: int
    expander_kernels: int
    expander_weights: int
    parameters: int
    """Of backbone and expander."""
    norms: int
    """Batch normalisations in both."""
    optimizer_kernels: int
    """Of an update by LARS."""
    optimizer_traffic: int
    dim: int
    """D."""


class LossWork(NamedTuple):
    """The loss's share of a step, in one process."""

    flops: float
    traffic: float
    """Bytes."""
    gathers: tuple[float, ...]
    """Of each all-gather, the bytes that every process then holds."""
    reductions: tuple[float, ...]
    """Of each all-reduce, the bytes that every process puts in."""


def count_work(architecture: str, image_size: int, expander_dims: Sequence[int]) -> Work:
    """Count a model's work, without computing any of it."""
    with torch.device("meta"):
        model = VICRegModel(
            VICRegConfig(architecture=architecture, expander_dims=list(expander_dims))
        ).train()
        images = torch.empty(COUNTED_IMAGES, 3, image_size, image_size)
        features = torch.empty(COUNTED_IMAGES, model.num_features)
    backbone = count(lambda: model.backbone(images))
    expander = count(lambda: model.expander(features))
    optimizer = create_optimizer("lars", model, lr=0.1, weight_decay=1e-6)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()  # makes the momentum
    update = count(optimizer.step)
    return Work(
        backbone_flops=backbone.flops // COUNTED_IMAGES,
        backbone_kernels=backbone.kernels,
        expander_flops=expander.flops // COUNTED_IMAGES,
        expander_kernels=expander.kernels,
        expander_weights=_size(model.expander),
        parameters=_size(model),
        norms=sum(isinstance(module, _BatchNorm) for module in model.modules()),
        optimizer_kernels=update.kernels,
        optimizer_traffic=update.traffic,
        dim=expander_dims[-1] if expander_dims else model.num_features,
    )


def our_loss_work(
    num_rows: int, dim: int, world: int, *, embedding_bytes: int = 2, stripe: int = 2048
) -> LossWork:
    """What `vicreg_loss` costs one of W processes, both branches together.

    Args:
        num_rows: N.
        dim: D.
        world: W.
        embedding_bytes: of an entry of the embeddings, as they are gathered.
        stripe: rows of a symmetric product formed at once, `covariance.STRIPE_ROWS`.
    """
    n, leading = num_rows / world, min(LEADING, dim)
    if prefers_gram(num_rows, dim):
        product = _symmetric(num_rows, dim, stripe) if world == 1 else 2 * n * num_rows * dim
        flops = product + 2 * n * num_rows * dim + 2 * leading * dim * (num_rows + 2 * n)
        traffic = _traffic(GRAM_TRAFFIC, num_rows * dim, n * dim, n * num_rows)
        gathers, reductions = (2 * num_rows * dim * embedding_bytes,), ()
    else:
        flops = _symmetric(dim, n, stripe) + 2 * n * dim * dim
        traffic = _traffic(COVARIANCE_TRAFFIC, num_rows * dim, n * dim, dim * dim)
        gathers, reductions = (), (FLOAT32 * dim, FLOAT32 * dim * dim) * 2
    return LossWork(2 * flops, 2 * traffic, gathers, reductions)


def authors_loss_work(num_rows: int, dim: int, world: int, *, embedding_bytes: int = 2) -> LossWork:
    """What the authors' formula costs each of W processes, both branches together.

    Every process forms the whole covariance matrix, and the gradient of all rows is summed.

    Args: as for `our_loss_work`.
    """
    n, branch = num_rows / world, num_rows * dim * embedding_bytes
    traffic = _traffic(AUTHORS_TRAFFIC, num_rows * dim, n * dim, dim * dim)
    return LossWork(2 * 6 * num_rows * dim * dim, 2 * traffic, (branch,) * 2, (branch,) * 2)


def count(run: Callable[[], object], custom: dict[Any, Any] | None = None) -> Count:
    """Count what runs.

    Args:
        run: anything, on any device.
        custom: flops of operations that torch's counter leaves out.
    """
    with _Tally() as tally, FlopCounterMode(display=False, custom_mapping=custom) as counter:
        run()
    return Count(counter.get_total_flops(), tally.kernels, tally.traffic)


class _Tally(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.traffic = 0, 0

    def __torch_dispatch__(
        self, func: Any, _: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view:
            self.kernels += 1
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.traffic += sum(x.numel() * x.element_size() for x in tensors)
        return out


def _symmetric(rows: float, inner: float, stripe: int) -> float:
    """Flops of X X^T for X of (rows, inner), of which mirrored blocks are computed once."""
    starts = range(0, int(rows), stripe)
    return sum(2 * min(stripe, rows - start) * (rows - start) * inner for start in starts)


def _traffic(elements: dict[str, float], everyone: float, own: float, product: float) -> float:
    sizes = {"all rows": everyone, "own rows": own, "product": product}
    return FLOAT32 * sum(times * sizes[name] for name, times in elements.items())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
