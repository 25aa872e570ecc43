"""The VICReg loss of more than two views.

Shapes: n rows in this process, N = n * world size rows in all, D embedding dimensions, V views.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vicreg_hf.loss.autograd import VICRegTerms, weighted_terms
from vicreg_hf.loss.checks import VarianceReduction, check_embeddings
from vicreg_hf.runtime.distributed import ProcessGroup


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
    a global and a local one; two local ones are never compared. Variance and covariance
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
        sim_coeff: as in `vicreg_loss`; likewise std_coeff, cov_coeff, gamma and eps.
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
    for name, views in (("global_views", global_views), ("local_views", local_views)):
        if not isinstance(views, Sequence):
            shape = f" of shape {tuple(views.shape)}" if isinstance(views, Tensor) else ""
            raise ValueError(
                f"{name} must be a list of tensors (rows, dimensions), one for each view, got "
                f"{type(views).__name__}{shape}."
            )
    if len(global_views) < 2:
        raise ValueError(
            f"global_views must hold at least 2 views, got {len(global_views)}; "
            "give them as a sequence of (rows, dimensions)."
        )
    views = [*global_views, *local_views]
    check_embeddings("views must all have the same shape", *views)
    return weighted_terms(
        views, len(global_views), sim_coeff=sim_coeff, std_coeff=std_coeff, cov_coeff=cov_coeff,
        gamma=gamma, eps=eps, variance_reduction=variance_reduction, group=group,
    )  # fmt: skip
