"""The single terms of the loss, as regularisers of one batch.

Shapes: n rows in this process, N = n * world size rows in all, D embedding dimensions.
"""

from __future__ import annotations

from torch import Tensor

from vicreg_hf.loss.autograd import Settings, compute
from vicreg_hf.loss.checks import check_embeddings, check_tensors, check_weights
from vicreg_hf.runtime.distributed import ProcessGroup


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
