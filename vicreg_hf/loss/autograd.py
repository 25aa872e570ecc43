"""The terms of the loss for any number of views, as one differentiable function.

Shapes: n rows in this process, N = n * world size rows in all, D embedding dimensions, V views, of
which the first G are global.

With X the centred (N, D) embeddings of a view, the sum of squares of X^T X (D, D) equals that of
X X^T (N, N). So the covariance term has two exact forms, and the cheaper one is taken:

    Gram, when N < D:         each process forms its own rows of X X^T
    covariance, otherwise:    each process adds its rows' share of X^T X

With that product a process has all that its own gradient needs: backward communicates nothing.
`vicreg_hf.loss.covariance` holds the two forms.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicreg_hf.loss import covariance
from vicreg_hf.loss.checks import VarianceReduction, check_coefficients
from vicreg_hf.loss.covariance import GradientWeights, ViewStatistics
from vicreg_hf.runtime.distributed import (
    ProcessGroup,
    check_same_shape,
    find_group,
    gather_rows,
    sum_over_processes,
    world_size,
)


class VICRegTerms(NamedTuple):
    """The loss and its three unweighted terms; only `loss` carries a gradient."""

    loss: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor


class Settings(NamedTuple):
    """Coefficients and constants of the loss."""

    sim: float
    std: float
    cov: float
    gamma: float
    eps: float
    view_weight: float
    """Factor of each view in the variance term."""


def _forward(
    views: Sequence[Tensor],
    num_global: int,
    product: bool,
    settings: Sequence[float],
    group_name: str,
) -> list[Tensor]:
    """Compute the four `VICRegTerms`, the gathered rows or an empty tensor, V `ViewStatistics`.

    Args:
        product: False leaves out the covariance term, which is then zero.
    """
    by, group = Settings(*settings), find_group(group_name)
    z, num_views = views[0], len(views)
    (n, dim), processes = z.shape, world_size(group)
    check_same_shape(z, group, counts=(num_global, num_views - num_global))
    total, pairs = n * processes, _pairs(num_views, num_global)
    if total < 2:
        raise ValueError(
            f"variance needs at least 2 rows over all processes, got {total}; use a larger batch."
        )
    with torch.autocast(z.device.type, enabled=False):
        gathered = z.new_empty(0)
        if product and processes > 1 and covariance.prefers_gram(total, dim):
            gathered = gather_rows(torch.stack(list(views), 1), group)
        analysed = [
            covariance.analyse(rows, n, total, group, product=product)
            for rows in (gathered.unbind(1) if gathered.numel() else views)
        ]
        shares = torch.stack([share for _, share in analysed])
        distances = [_squared_distance(views[i], views[j]) for i, j in pairs]
        distances = [shares.new_zeros(()), *distances]
        sums = torch.stack([torch.stack(distances).sum(), shares.sum()])
        distance, squares = sum_over_processes(sums, group)
        invariance = distance / (total * dim * max(1, len(pairs)))
        squares = squares * (2 / num_views)
        if product and covariance.prefers_gram(total, dim):
            # rounding can make the difference that the Gram form takes negative
            squares = squares.clamp_(min=0)
        hinges = [_hinge(statistics, by)[0].mean() for statistics, _ in analysed]
        variance = torch.stack(hinges).sum() * by.view_weight
        loss = by.sim * invariance + by.std * variance + by.cov * squares
    saved = [tensor for statistics, _ in analysed for tensor in statistics]
    return [loss, invariance, variance, squares, gathered, *saved]


def _backward(
    grad: Tensor,
    views: Sequence[Tensor],
    saved: list[Tensor],
    needed: Sequence[bool],
    num_global: int,
    settings: Sequence[float],
    group_name: str,
) -> list[Tensor]:
    """Compute the gradients of all views from the results of `_forward`; empty where not needed.

    `saved` is emptied, so that a view's product is freed before its gradient is returned.
    """
    by, group = Settings(*settings), find_group(group_name)
    by = by._replace(cov=by.cov * 2 / len(views))
    size = len(ViewStatistics._fields)
    gathered = saved[0]
    last_first = [ViewStatistics(*saved[i : i + size]) for i in range(len(saved) - size, 0, -size)]
    saved.clear()
    (n, dim), processes = views[0].shape, world_size(group)
    total, pairs = n * processes, _pairs(len(views), num_global)
    grads = []
    with torch.autocast(grad.device.type, enabled=False):
        for index, rows in enumerate(gathered.unbind(1) if gathered.numel() else views):
            statistics = last_first.pop()
            if not needed[index]:
                grads.append(views[index].new_empty(0))
                continue
            partners = [views[sum(pair) - index] for pair in pairs if index in pair]
            # Twice the difference, summed over partners, is as many times that from their mean.
            difference = 2 * by.sim * len(partners) / (total * dim * max(1, len(pairs)))
            other = _mean(partners) if partners else views[index]
            lacking, deviation = _hinge(statistics, by)
            slope = by.std * by.view_weight / ((total - 1) * dim)
            weights = GradientWeights(
                covariance=4 * by.cov / ((total - 1) * dim),
                columns=(lacking > 0) / deviation * -slope,
                difference=difference,
                # DDP averages over processes; the global gradient must survive that.
                total=grad * processes,
            )
            grads.append(
                covariance.differentiate(statistics, rows, views[index], other, weights, group)
            )
    return grads


def _pairs(num_views: int, num_global: int) -> list[tuple[int, int]]:
    """List the pairs of views that the invariance term compares: no two local ones."""
    return [(i, j) for i in range(num_global) for j in range(i + 1, num_views)]


def _mean(views: Sequence[Tensor]) -> Tensor:
    if len(views) == 1:
        return views[0]
    total = views[0].to(covariance.compute_dtype(views[0]), copy=True)
    for view in views[1:]:
        total.add_(view)
    return total.div_(len(views))


# torch.compile takes each as one node and traces nothing inside, so the arithmetic is the same.
_forward_op = torch.library.custom_op("vicreg_hf::views_forward", _forward, mutates_args=())
_backward_op = torch.library.custom_op("vicreg_hf::views_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(views: Sequence[Tensor], _: int, product: bool, __: Sequence[float], name: str) -> Any:
    z, num_views = views[0], len(views)
    (n, dim), processes = z.shape, world_size(find_group(name))
    total = n * processes
    gathers = product and processes > 1 and covariance.prefers_gram(total, dim)
    gathered = z.new_empty((total, num_views, dim) if gathers else 0)
    x = z.new_empty(0, dtype=covariance.compute_dtype(z))
    statistics = [covariance.allocate(x, n, total, dim, product=product) for _ in views]
    saved = [tensor for one in statistics for tensor in one]
    return [*(x.new_empty(()) for _ in range(4)), gathered, *saved]


@_backward_op.register_fake
def _(_: Tensor, views: Sequence[Tensor], __: Any, needed: Sequence[bool], *___: Any) -> Any:
    return [z.new_empty(z.shape if wanted else 0) for z, wanted in zip(views, needed, strict=True)]


class _Terms(torch.autograd.Function):
    """`_forward` and `_backward` as one differentiable function."""

    @staticmethod
    def forward(
        ctx: Any,
        num_global: int,
        product: bool,
        settings: Sequence[float],
        group_name: str,
        *views: Tensor,
    ) -> tuple[Tensor, ...]:
        run = _forward_op if torch.compiler.is_compiling() else _forward
        results = run(list(views), num_global, product, settings, group_name)
        ctx.save_for_backward(*views, *results[4:])
        ctx.num_views, ctx.settings = len(views), (num_global, settings, group_name)
        ctx.mark_non_differentiable(*results[1:4])
        return tuple(results[:4])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        compiling = torch.compiler.is_compiling()  # which refuses second derivatives itself
        if torch.is_grad_enabled() and not compiling:
            raise RuntimeError(
                "the VICReg loss and its terms have no second derivative; call backward without "
                "create_graph=True."
            )
        run = _backward_op if compiling else _backward
        tensors = list(ctx.saved_tensors)
        views, saved = tensors[: ctx.num_views], tensors[ctx.num_views :]
        del tensors
        if not compiling:
            ctx.maybe_clear_saved_tensors()  # unless the graph is retained
        needed = ctx.needs_input_grad[4:]
        result = run(grads[0], views, saved, needed, *ctx.settings)
        own = (g if wanted else None for g, wanted in zip(result, needed, strict=True))
        return (None, None, None, None, *own)


def weighted_terms(
    views: Sequence[Tensor],
    num_global: int,
    *,
    sim_coeff: float,
    std_coeff: float,
    cov_coeff: float,
    gamma: float = 1.0,
    eps: float = 1e-4,
    variance_reduction: VarianceReduction = "mean",
    group: ProcessGroup,
    product: bool = True,
) -> VICRegTerms:
    """Compute the loss of V views, with a gradient; see `multi_view_loss` for the arguments.

    Args:
        views: (n, D) each, checked; the first `num_global` are the global ones.
        product: False leaves out the covariance term, which is then zero.

    Raises:
        ValueError: a coefficient or a reduction that cannot be, or shapes that differ between
            processes.
    """
    check_coefficients(
        variance_reduction=variance_reduction, sim_coeff=sim_coeff, std_coeff=std_coeff,
        cov_coeff=cov_coeff, gamma=gamma, eps=eps,
    )  # fmt: skip
    view_weight = (1 if variance_reduction == "mean" else 2) / len(views)
    settings = list(Settings(sim_coeff, std_coeff, cov_coeff, gamma, eps, view_weight))
    dtype = functools.reduce(torch.promote_types, [z.dtype for z in views])
    views, name = [z.to(dtype) for z in views], "" if group is None else group.group_name
    if torch.is_grad_enabled() and any(z.requires_grad for z in views):
        return VICRegTerms(*_Terms.apply(num_global, product, settings, name, *views))
    # Nothing is kept for a backward pass; dynamo, too, calls a Function wrongly without one.
    run = _forward_op if torch.compiler.is_compiling() else _forward
    return VICRegTerms(*run(views, num_global, product, settings, name)[:4])


def _squared_distance(z: Tensor, z_prime: Tensor) -> Tensor:
    """Sum of the squared differences, by blocks."""
    blocks = zip(covariance.in_blocks(z), covariance.in_blocks(z_prime), strict=True)
    dtype = covariance.compute_dtype(z)
    return torch.stack([(a.to(dtype) - b.to(dtype)).square_().sum() for a, b in blocks]).sum()


def _hinge(statistics: ViewStatistics, by: Settings) -> tuple[Tensor, Tensor]:
    """By how much each dimension's standard deviation is below gamma, and that deviation."""
    deviation = (statistics.variance + by.eps).sqrt()
    return (by.gamma - deviation).clamp(min=0), deviation
