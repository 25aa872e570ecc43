"""The single terms of the loss, as regularisers of one batch.

Shapes: n rows in this process, N = n * world size rows in all, D embedding dimensions.
"""

from __future__ import annotations

from torch import Tensor

from vicreg_hf.loss.autograd import weighted_terms
from vicreg_hf.loss.checks import check_embeddings
from vicreg_hf.runtime.distributed import ProcessGroup


def variance_term(
    z: Tensor, *, gamma: float = 1.0, eps: float = 1e-4, group: ProcessGroup = None
) -> Tensor:
    """Penalise dimensions of one batch that vary too little, over all processes.

    It is the mean over D of relu(gamma - sqrt(Var + eps)), the variance unbiased. It is computed in
    float32 whatever the autocast (in float64 for float64 input), in O(N D), without a product of z.

    Where torch.distributed is initialised the variance is that of the rows of all processes, and
    the gradient is scaled for an average over processes, as DistributedDataParallel and with it
    transformers' Trainer take it: that average is the gradient of one process holding every row.
    Where gradients are added up instead, divide by the number of processes. It has no second
    derivative: create_graph=True raises.

    Args:
        z: (n, D) embeddings or representations, the same n in every process.
        gamma: the standard deviation below which a dimension is penalised.
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
    check_embeddings("z must have shape", z)
    return weighted_terms(
        [z], 1, sim_coeff=0.0, std_coeff=1.0, cov_coeff=0.0, gamma=gamma, eps=eps, group=group,
        product=False,
    ).loss  # fmt: skip


def covariance_term(z: Tensor, *, group: ProcessGroup = None) -> Tensor:
    """Penalise correlated dimensions of one batch, over all processes.

    It is the sum of the squared covariances of different dimensions, divided by D. The cheaper of
    two exact forms is taken, the (N, N) Gram matrix if N < D, otherwise the (D, D) covariance
    matrix; precision, processes and gradient are as in `variance_term`.

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
    check_embeddings("z must have shape", z)
    # The loss doubles the mean over views.
    return weighted_terms([z], 1, sim_coeff=0.0, std_coeff=0.0, cov_coeff=0.5, group=group).loss
