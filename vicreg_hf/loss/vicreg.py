"""The VICReg loss: global statistics, float32 throughout, its own backward pass.

Shapes: n rows in this process, N = n * world size rows in all, D embedding dimensions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vicreg_hf.loss.autograd import VICRegTerms, weighted_terms
from vicreg_hf.loss.checks import VarianceReduction, check_coefficients, check_embeddings
from vicreg_hf.runtime.distributed import ProcessGroup


def vicreg_loss(
    z: Tensor,
    z_prime: Tensor,
    *,
    sim_coeff: float = 25.0,
    std_coeff: float = 25.0,
    cov_coeff: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
    variance_reduction: VarianceReduction = "mean",
    group: ProcessGroup = None,
) -> VICRegTerms:
    """The VICReg loss of two batches of embeddings, over all processes.

    Computed in float32 whatever the autocast (in float64 for float64 input); matrix products are
    TF32 where torch is told to. Where torch.distributed is initialised, statistics are those of
    the rows of all processes, and the gradient is scaled so that DistributedDataParallel's
    averaging gives the gradient of one process holding every row.

    Peak memory of forward and backward on one process, gradients included: three float32 copies
    of z and one block (`covariance.BLOCK_ELEMENTS`). On W processes: the gathered rows, 2 N D in
    the dtype of z, and a float32 copy of half of them if N < D; otherwise two (D, D) matrices.

    It has no second derivative: create_graph=True raises. A float16 gradient stops at the largest
    float16, unless a loss scale takes it beyond, so that a gradient scaler sees the overflow.

    Args:
        z: (n, D) embeddings of the first views, the same n in every process.
        z_prime: (n, D) embeddings of the second views.
        sim_coeff: lambda, weight of the invariance term.
        std_coeff: mu, weight of the variance term.
        cov_coeff: nu, weight of the covariance term.
        gamma: the standard deviation that the variance term asks of every dimension.
        eps: added to the variance before the root.
        variance_reduction: "mean" averages the variance term over the two views, as the
            authors' code; "sum" adds them, as the paper's pseudo-code.
        group: the processes that share the batch; None is the default group.

    Returns:
        Scalars loss, invariance, variance and covariance, the same in every process. The terms are
        detached and not weighted.

    Raises:
        ValueError: shapes that differ, also between processes, or are not (n, D), no dimensions,
            embeddings that are no tensors, integers or on several devices, fewer than two rows in
            all, an unknown variance_reduction, or a weight or constant that is not a finite number
            of at least 0.

    Source: Bardes et al. 2022, arXiv:2105.04906, eq. 1-6; scaling as vicreg@4e12602.
    """
    check_embeddings("z and z_prime must both have shape", z, z_prime)
    return weighted_terms(
        [z, z_prime], 2, sim_coeff=sim_coeff, std_coeff=std_coeff, cov_coeff=cov_coeff,
        gamma=gamma, eps=eps, variance_reduction=variance_reduction, group=group,
    )  # fmt: skip


class VICRegLoss(nn.Module):
    """`vicreg_loss` as a module; see there for the arguments.

    Raises:
        ValueError: an unknown variance_reduction, or a weight or constant that is not a finite
            number of at least 0.
    """

    def __init__(
        self,
        sim_coeff: float = 25.0,
        std_coeff: float = 25.0,
        cov_coeff: float = 1.0,
        *,
        gamma: float = 1.0,
        eps: float = 1e-4,
        variance_reduction: VarianceReduction = "mean",
        group: ProcessGroup = None,
    ) -> None:
        super().__init__()
        self.sim_coeff, self.std_coeff, self.cov_coeff = sim_coeff, std_coeff, cov_coeff
        self.gamma, self.eps, self.variance_reduction = gamma, eps, variance_reduction
        self.group = group
        check_coefficients(**self._settings)

    @property
    def _settings(self) -> dict[str, Any]:
        names = ("sim_coeff", "std_coeff", "cov_coeff", "gamma", "eps", "variance_reduction")
        return {name: getattr(self, name) for name in names}

    def forward(self, z: Tensor, z_prime: Tensor) -> VICRegTerms:
        return vicreg_loss(z, z_prime, **self._settings, group=self.group)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self._settings.items())
