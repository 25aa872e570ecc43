"""The loss of more than two views, and its terms for one batch, as a regulariser.

Shapes: n rows in this process, N = n * world size rows in all, D embedding dimensions, V views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vicreg_hf.distributed import ProcessGroup
from vicreg_hf.loss import (
    VarianceReduction,
    check_embeddings,
    check_tensors,
    check_weights,
    find_branch_weight,
)
from vicreg_hf.terms import Settings, VICRegTerms, compute


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
        ValueError: a shape that is not (n, D) or differs between processes, no dimensions,
            embeddings that are no tensor or integers, fewer than two rows in all, or a constant
            that is not a finite number of at least 0.

    Source: Bardes et al. 2022, arXiv:2105.04906, eq. 1-2. As a regulariser of supervised training:
    Zhu et al. 2023, arXiv:2306.13292.
    """
    _check_one(z)
    check_weights(gamma=gamma, eps=eps)
    settings = Settings(0.0, 1.0, 0.0, gamma, eps, branch_weight=1.0)
    return compute([z], 1, settings, group, product=False).loss


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
    return compute([z], 1, Settings(0.0, 0.0, 0.5, 1.0, 1e-4, branch_weight=0.0), group).loss


def _check_one(z: Tensor) -> None:
    check_tensors(z)
    if z.ndim != 2:
        raise ValueError(f"z must have shape (rows, dimensions), got {tuple(z.shape)}.")
    check_embeddings(z)


def _check_views(name: str, views: Any) -> None:
    if not isinstance(views, Sequence):
        shape = f" of shape {tuple(views.shape)}" if isinstance(views, Tensor) else ""
        raise ValueError(
            f"{name} must be a list of tensors (rows, dimensions), one for each view, got "
            f"{type(views).__name__}{shape}."
        )


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
            not (n, D), no dimensions, views that are no list or no tensors, integers or on several
            devices, fewer than two rows in all, an unknown variance_reduction, or a weight or
            constant that is not a finite number of at least 0.

    Source: the terms of Bardes et al. 2022, arXiv:2105.04906; local views as in Caron et al. 2020,
    arXiv:2006.09882.
    """
    _check_views("global_views", global_views)
    _check_views("local_views", local_views)
    views = [*global_views, *local_views]
    if len(global_views) < 2:
        raise ValueError(
            f"global_views must hold at least 2 views, got {len(global_views)}; "
            "give them as a sequence of (rows, dimensions)."
        )
    check_tensors(*views)
    if views[0].ndim != 2 or any(z.shape != views[0].shape for z in views):
        received = ", ".join(str(tuple(z.shape)) for z in views)
        raise ValueError(f"views must all have the same shape (rows, dimensions), got {received}.")
    check_embeddings(*views)
    check_weights(
        sim_coeff=sim_coeff, std_coeff=std_coeff, cov_coeff=cov_coeff, gamma=gamma, eps=eps
    )
    dtype = views[0].dtype
    for z in views[1:]:
        dtype = torch.promote_types(dtype, z.dtype)
    weight = find_branch_weight(variance_reduction) * 2 / len(views)
    settings = Settings(sim_coeff, std_coeff, cov_coeff, gamma, eps, weight)
    return compute([z.to(dtype) for z in views], len(global_views), settings, group)
