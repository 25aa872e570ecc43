"""The terms of the VICReg loss for any number of views: one (a regulariser), or more than two.

Shapes: n rows in this process, N = n * world size rows in all, D embedding dimensions, V views, of
which the first G are global. Two views have their own, `vicreg_hf.loss`; the arithmetic is shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vicreg_hf import covariance
from vicreg_hf.covariance import Branch
from vicreg_hf.distributed import (
    ProcessGroup,
    check_same_shape,
    find_group,
    gather_rows,
    sum_over_processes,
    world_size,
)
from vicreg_hf.loss import (
    Settings,
    VarianceReduction,
    VICRegTerms,
    check_floating_point,
    count_rows,
    find_branch_weight,
    hinge,
    rows_of,
    squared_distance,
    vicreg_loss,
    weigh,
)


def _forward(
    views: Sequence[Tensor],
    num_global: int,
    product: bool,
    settings: Sequence[float],
    group_name: str,
) -> list[Tensor]:
    """The four of `VICRegTerms`, the gathered rows (empty if none are), and V `Branch`es.

    Args:
        product: False leaves out what only the covariance term needs, which is then zero.
    """
    by, group = Settings(*settings), find_group(group_name)
    z, num_views = views[0], len(views)
    (n, dim), processes = z.shape, world_size(group)
    counts = (num_global, num_views - num_global)
    check_same_shape(z if num_views == 1 else z.expand(*counts, n, dim), group)
    total, pairs = count_rows(n, group), _pairs(num_views, num_global)
    with torch.autocast(z.device.type, enabled=False):
        gathered = z.new_empty(0)
        if product and processes > 1 and covariance.prefers_gram(total, dim):
            gathered = gather_rows(torch.stack(list(views), 1), group)
        analysed = [
            covariance.analyse(rows, n, total, group, product=product)
            for rows in rows_of(views, gathered)
        ]
        shares = torch.stack([share for _, share in analysed])
        distances = [
            shares.new_zeros(()),
            *(squared_distance(views[i], views[j]) for i, j in pairs),
        ]
        sums = torch.stack([torch.stack(distances).sum(), shares.sum()])
        distance, squares = sum_over_processes(sums, group)
        invariance = distance / (total * dim * max(1, len(pairs)))
        squares = squares * (2 / num_views)
        hinges = [hinge(branch, by)[0].mean() for branch, _ in analysed]
        variance = torch.stack(hinges).sum() * by.branch_weight
        loss = by.sim * invariance + by.std * variance + by.cov * squares
    saved = [tensor for branch, _ in analysed for tensor in branch]
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
    """Gradients of all views, from what `_forward` returned; empty where not needed.

    `saved` is emptied, so that a view's product is gone when its gradient is there.
    """
    by, group = Settings(*settings), find_group(group_name)
    by = by._replace(cov=by.cov * 2 / len(views))
    size = len(Branch._fields)
    gathered = saved[0]
    branches = [Branch(*saved[i : i + size]) for i in range(len(saved) - size, 0, -size)]
    saved.clear()
    (n, dim), processes = views[0].shape, world_size(group)
    total, num_pairs = n * processes, max(1, len(_pairs(len(views), num_global)))
    grads = []
    with torch.autocast(grad.device.type, enabled=False):
        for index, rows in enumerate(rows_of(views, gathered)):
            branch = branches.pop()
            if not needed[index]:
                grads.append(views[index].new_empty(0))
                continue
            partners = _partners(views, index, num_global)
            # The sum over partners of twice the difference is that from their mean, so often.
            difference = 2 * by.sim * len(partners) / (total * dim * num_pairs)
            other = _mean(partners) if partners else views[index]
            # DDP averages over processes; what is global must survive that.
            weights = weigh(branch, by, total, difference, grad * processes)
            grads.append(
                covariance.differentiate(branch, rows, views[index], other, weights, group)
            )
    return grads


def _pairs(num_views: int, num_global: int) -> list[tuple[int, int]]:
    """The pairs of views that are drawn together: none of two local ones."""
    return [(i, j) for i in range(num_global) for j in range(i + 1, num_views)]


def _partners(views: Sequence[Tensor], index: int, num_global: int) -> list[Tensor]:
    """The views that a view is paired with."""
    pairs = _pairs(len(views), num_global)
    return [views[sum(pair) - index] for pair in pairs if index in pair]


def _mean(views: Sequence[Tensor]) -> Tensor:
    total = views[0].to(covariance.compute_dtype(views[0]), copy=True)
    for view in views[1:]:
        total.add_(view)
    return total.div_(len(views))


# torch.compile takes each as one node, as `vicreg_hf.loss` has it.
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
    branches = [covariance.allocate(x, n, total, dim, product=product) for _ in views]
    saved = [tensor for branch in branches for tensor in branch]
    return [*(x.new_empty(()) for _ in range(4)), gathered, *saved]


@_backward_op.register_fake
def _(_: Tensor, views: Sequence[Tensor], __: Any, needed: Sequence[bool], *___: Any) -> Any:
    return [z.new_empty(z.shape if wanted else 0) for z, wanted in zip(views, needed, strict=True)]


class _Views(torch.autograd.Function):
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
        loss, invariance, variance, covariance, *saved = results
        ctx.save_for_backward(*views, *saved)
        ctx.num_views, ctx.settings = len(views), (num_global, settings, group_name)
        ctx.mark_non_differentiable(invariance, variance, covariance)
        return loss, invariance, variance, covariance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        compiling = torch.compiler.is_compiling()  # which refuses second derivatives itself
        if torch.is_grad_enabled() and not compiling:
            raise RuntimeError(
                "variance_term, covariance_term and multi_view_loss have no second derivative; "
                "call backward without create_graph=True."
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


def _compute(
    views: Sequence[Tensor],
    num_global: int,
    settings: Settings,
    group: ProcessGroup,
    *,
    product: bool = True,
) -> VICRegTerms:
    name = "" if group is None else group.group_name
    return VICRegTerms(*_Views.apply(num_global, product, list(settings), name, *views))


def variance_term(
    z: Tensor, *, gamma: float = 1.0, eps: float = 1e-4, group: ProcessGroup = None
) -> Tensor:
    """What the standard deviations of one batch's dimensions lack of gamma, over all processes.

    The mean over D of relu(gamma - sqrt(Var + eps)), the variance unbiased. Computed in float32
    whatever the autocast (in float64 for float64 input), in O(N D), without a product of z.

    Where torch.distributed is initialised the variance is that of the rows of all processes, and
    the gradient is scaled for an average over processes, as DistributedDataParallel and with it
    transformers' Trainer take it: that average is the gradient of one process holding every row.
    Where gradients are added up instead, divide by the number of processes. It has no second
    derivative: create_graph=True raises.

    Args:
        z: (n, D) embeddings or representations, the same n in every process.
        gamma: the standard deviation that is asked of every dimension.
        eps: added to the variance before the root.
        group: the processes that share the batch; None is the default group.

    Returns:
        Scalar, >= 0, the same in every process, with a gradient.

    Raises:
        ValueError: a shape that is not (n, D) or differs between processes, integer embeddings,
            fewer than two rows in all.

    Source: Bardes et al. 2022, arXiv:2105.04906, eq. 1-2. As a regulariser of supervised training:
    Zhu et al. 2023, arXiv:2306.13292.
    """
    _check_one(z)
    settings = Settings(0.0, 1.0, 0.0, gamma, eps, branch_weight=1.0)
    return _compute([z], 1, settings, group, product=False).loss


def covariance_term(z: Tensor, *, group: ProcessGroup = None) -> Tensor:
    """The squared covariances of one batch's dimensions with each other, over all processes.

    The sum of squares off the diagonal, over D. The cheaper of two exact forms is taken, the
    (N, N) Gram matrix if N < D, otherwise the (D, D) covariance matrix; precision, processes and
    gradient are as in `variance_term`.

    Args:
        z: (n, D) embeddings or representations, the same n in every process.
        group: the processes that share the batch; None is the default group.

    Returns:
        Scalar, >= 0, the same in every process, with a gradient.

    Raises:
        ValueError: as in `variance_term`.

    Source: Bardes et al. 2022, arXiv:2105.04906, eq. 3-4; scaling as vicreg@4e12602. As a
    regulariser of supervised training: Zhu et al. 2023, arXiv:2306.13292.
    """
    _check_one(z)
    # The term doubles the mean over views.
    return _compute([z], 1, Settings(0.0, 0.0, 0.5, 1.0, 1e-4, branch_weight=0.0), group).loss


def _check_one(z: Tensor) -> None:
    if z.ndim != 2:
        raise ValueError(f"z must have shape (rows, dimensions), got {tuple(z.shape)}.")
    check_floating_point(z)


def multi_view_loss(
    global_views: Sequence[Tensor],
    local_views: Sequence[Tensor] = (),
    *,
    sim_coeff: float = 25.0,
    std_coeff: float = 25.0,
    cov_coeff: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
    variance_reduction: VarianceReduction = "mean",
    group: ProcessGroup = None,
) -> VICRegTerms:
    """The VICReg loss of more than two views of the same images, over all processes.

    Invariance is the mean of the mean squared errors of all pairs of global views and all pairs of
    a global and a local one; two local ones are never drawn together. Variance and covariance
    are those of `vicreg_loss` with the mean over all views in place of that over two, so that
    weights found for two views keep their meaning. Of two global views alone it is `vicreg_loss`.
    Precision, processes and gradient are as there.

    Peak memory of forward and backward on one process, gradients included: a copy of every view in
    its own dtype, two of one view in float32, and V products (N, N) if N < D, otherwise (D, D). On
    W processes, if N < D: products (n, N), the rows of all views, V N D in the dtype of the views,
    gathered in one call, and a float32 copy of one view's.

    Args:
        global_views: two or more (n, D) embeddings, row by row of the same images.
        local_views: further ones, of smaller crops.
        sim_coeff: weight of the invariance term.
        std_coeff: weight of the variance term.
        cov_coeff: weight of the covariance term.
        gamma: the standard deviation that the variance term asks of every dimension.
        eps: added to the variance before the root.
        variance_reduction: "mean" averages the variance term over the views, "sum" doubles that,
            which for two views is their sum.
        group: the processes that share the batch; None is the default group. All must hold equally
            many global and local views.

    Returns:
        Scalars loss, invariance, variance and covariance, the same in every process. The terms are
        detached and not weighted.

    Raises:
        ValueError: fewer than two global views, shapes that differ, also between processes, or are
            not (n, D), integer embeddings, fewer than two rows in all, an unknown
            variance_reduction.

    Source: the terms of Bardes et al. 2022, arXiv:2105.04906; local views as in Caron et al. 2020,
    arXiv:2006.09882.
    """
    views = [*global_views, *local_views]
    if len(global_views) < 2:
        raise ValueError(
            f"global_views must hold at least 2 views, got {len(global_views)}; "
            "give them as a sequence of (rows, dimensions)."
        )
    if len(views) == 2:
        return vicreg_loss(
            *views, sim_coeff=sim_coeff, std_coeff=std_coeff, cov_coeff=cov_coeff, gamma=gamma,
            eps=eps, variance_reduction=variance_reduction, group=group,
        )  # fmt: skip
    if views[0].ndim != 2 or any(z.shape != views[0].shape for z in views):
        received = ", ".join(str(tuple(z.shape)) for z in views)
        raise ValueError(f"views must all have the same shape (rows, dimensions), got {received}.")
    check_floating_point(*views)
    dtype = views[0].dtype
    for z in views[1:]:
        dtype = torch.promote_types(dtype, z.dtype)
    weight = find_branch_weight(variance_reduction) * 2 / len(views)
    settings = Settings(sim_coeff, std_coeff, cov_coeff, gamma, eps, weight)
    return _compute([z.to(dtype) for z in views], len(global_views), settings, group)
