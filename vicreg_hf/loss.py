"""The VICReg loss: global statistics, float32 throughout, its own backward pass.

Shapes: n rows in this process, N = n * world size rows in all, D embedding dimensions.

With X the centred (N, D) embeddings, the sum of squares of X^T X (D, D) equals that of X X^T
(N, N). So the covariance term has two exact forms, and the cheaper one is taken:

    Gram, when N < D:         each process forms its own rows of X X^T
    covariance, otherwise:    each process adds its rows' share of X^T X

In both, a process's gradient follows from what it already holds, so backward communicates nothing.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vicreg_hf.distributed import ProcessGroup, gather_rows, rank, sum_over_processes, world_size

VarianceReduction = Literal["mean", "sum"]
BLOCK_ELEMENTS = 2**22
"""Entries of the Gram or covariance matrix held at once: 16 MiB of float32."""


LEADING = 8
"""Dimensions of largest variance that the Gram form treats apart, see `_gram_covariance`."""


class VICRegTerms(NamedTuple):
    """The loss and its three unweighted terms; only `loss` carries a gradient."""

    loss: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor


class _Moments(NamedTuple):
    """One branch after centring over all processes."""

    local: Tensor
    """(n, D): this process's rows."""
    everyone: Tensor | None
    """(N, D): all rows, of which local is a view; None in the covariance form."""
    variance: Tensor
    """(D,): unbiased."""


def _compute_dtype(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _gather_branches(branches: tuple[Tensor, Tensor], group: ProcessGroup) -> list[Tensor]:
    """All rows (N, D) of both branches, in one communication."""
    if world_size(group) == 1:
        return list(branches)
    return list(gather_rows(torch.stack(branches, 1), group).unbind(1))


def _centre_gathered(everyone: Tensor, n: int, group: ProcessGroup) -> _Moments:
    everyone = everyone.to(_compute_dtype(everyone))
    everyone = everyone - everyone.mean(0)
    start = rank(group) * n
    variance = torch.linalg.vector_norm(everyone, dim=0).square() / (len(everyone) - 1)
    return _Moments(everyone[start : start + n], everyone, variance)


def _centre_local(z: Tensor, total: int, group: ProcessGroup) -> _Moments:
    z = z.to(_compute_dtype(z))
    local = z - sum_over_processes(z.sum(0), group) / total
    squares = torch.linalg.vector_norm(local, dim=0).square()
    return _Moments(local, None, sum_over_processes(squares, group) / (total - 1))


def _gram_covariance(x: _Moments, grad: Tensor | None) -> Tensor:
    """This process's share of the covariance term; its gradient is added to grad (n, D).

    The Gram matrix also holds the variances, which are then taken off. That loses digits where few
    dimensions hold nearly all the variance, so the `LEADING` ones are set apart: their covariances
    with all dimensions are formed directly, and the Gram matrix is that of the others.
    """
    assert x.everyone is not None
    total, dim = x.everyone.shape
    scale, slope = 1 / (total - 1), 4 / ((total - 1) * dim)
    # Every process holds the same variances: one of the W shares of their sum of squares.
    share = len(x.local) / total
    leading = x.variance.topk(min(LEADING, dim)).indices
    top, top_local = x.everyone[:, leading], x.local[:, leading]
    x.everyone[:, leading] = 0
    variance = x.variance.index_fill(0, leading, 0)
    cross = top.T @ x.everyone * scale
    among = top.T @ top * scale
    among.diagonal().zero_()
    squares = among.square().sum() + 2 * cross.square().sum() - variance.square().sum()
    squares = squares * share
    rows = max(1, BLOCK_ELEMENTS // total)
    for start in range(0, len(x.local), rows):
        stop = min(start + rows, len(x.local))
        gram = x.local[start:stop] @ x.everyone.T * scale
        squares = squares + gram.square().sum()
        if grad is not None:
            grad[start:stop].addmm_(gram, x.everyone, alpha=slope)
    if grad is not None:
        grad.addcmul_(x.local, variance, value=-slope).addmm_(top_local, cross, alpha=slope)
        grad[:, leading] += (x.local @ cross.T + top_local @ among) * slope
    x.everyone[:, leading] = top
    return squares / dim


def _direct_covariance(x: _Moments, total: int, grad: Tensor | None, group: ProcessGroup) -> Tensor:
    """As `_gram_covariance`, from blocks of columns of the covariance matrix."""
    dim = x.local.shape[1]
    columns = max(1, BLOCK_ELEMENTS // dim)
    squares = x.local.new_zeros(())
    for start in range(0, dim, columns):
        stop = min(start + columns, dim)
        block = sum_over_processes(x.local[:, start:stop].T @ x.local, group) / (total - 1)
        block.diagonal(start).zero_()
        squares = squares + block.square().sum()
        if grad is not None:
            grad[:, start:stop].addmm_(x.local, block.T, alpha=4 / ((total - 1) * dim))
    return squares / dim * (len(x.local) / total)


class _VICReg(torch.autograd.Function):
    """Loss and terms; the gradient is formed in forward, where everything needed is at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        z_prime: Tensor,
        coefficients: tuple[float, float, float],
        gamma: float,
        eps: float,
        branch_weight: float,
        group: ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast(z.device.type, enabled=False):
            return _VICReg._forward(
                ctx, (z, z_prime), coefficients, gamma, eps, branch_weight, group
            )

    @staticmethod
    def _forward(
        ctx: Any,
        branches: tuple[Tensor, Tensor],
        coefficients: tuple[float, float, float],
        gamma: float,
        eps: float,
        branch_weight: float,
        group: ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sim, std, cov = coefficients
        (n, dim), processes = branches[0].shape, world_size(group)
        total = n * processes
        dtype = _compute_dtype(branches[0])
        difference = branches[0].to(dtype) - branches[1].to(dtype)
        hinges, shares, grads = [], [difference.square().sum() / (total * dim)], []
        gathered = _gather_branches(branches, group) if total < dim else None
        for index, wanted in enumerate(ctx.needs_input_grad[:2]):
            if gathered is not None:
                x = _centre_gathered(gathered[index], n, group)
                grad = torch.zeros_like(x.local) if wanted else None
                shares.append(_gram_covariance(x, grad))
            else:
                x = _centre_local(branches[index], total, group)
                grad = torch.zeros_like(x.local) if wanted else None
                shares.append(_direct_covariance(x, total, grad, group))
            deviation = (x.variance + eps).sqrt()
            hinge = (gamma - deviation).clamp(min=0)
            hinges.append(hinge.mean() * branch_weight)
            if grad is not None:
                slope = (hinge > 0) / (deviation * (-(total - 1) * dim / branch_weight))
                grad.mul_(cov).addcmul_(x.local, slope, value=std)
                grad.add_(difference, alpha=(1, -1)[index] * sim * 2 / (total * dim))
                # DDP averages over processes; what is global must survive that.
                grads.append(grad.mul_(processes))
        sums = sum_over_processes(torch.stack(shares), group)
        invariance, variance, covariance = sums[0], torch.stack(hinges).sum(), sums[1:].sum()
        ctx.save_for_backward(*grads)
        ctx.dtypes = [b.dtype for b in branches]
        ctx.mark_non_differentiable(invariance, variance, covariance)
        return (
            sim * invariance + std * variance + cov * covariance,
            invariance,
            variance,
            covariance,
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; the saved gradient is a constant
            raise RuntimeError(
                "vicreg_loss has no second derivative; call backward without create_graph=True."
            )
        saved = iter(ctx.saved_tensors)
        grads = [
            (next(saved) * grad_outputs[0]).to(dtype) if wanted else None
            for wanted, dtype in zip(ctx.needs_input_grad, ctx.dtypes, strict=False)
        ]
        return (*grads, None, None, None, None, None)


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

    Computed in float32 whatever the autocast (in float64 for float64 input). Where
    torch.distributed is initialised, statistics are those of the rows of all processes, and the
    gradient is scaled so that DistributedDataParallel's averaging gives the gradient of one
    process holding every row.

    Args:
        z: (n, D) embeddings of the first views, the same n in every process.
        z_prime: (n, D) embeddings of the second views.
        sim_coeff: lambda, weight of the invariance term.
        std_coeff: mu, weight of the variance term.
        cov_coeff: nu, weight of the covariance term.
        gamma: the standard deviation that the variance term asks of every dimension.
        eps: added to the variance before the root.
        variance_reduction: "mean" averages the variance term over the two branches, as the
            authors' code; "sum" adds them, as the paper's pseudo-code.
        group: process group; None is the default group.

    Returns:
        Scalars loss, invariance, variance and covariance, the same in every process. The terms are
        detached and not weighted.

    Raises:
        ValueError: shapes that differ or are not (n, D), integer embeddings, fewer than two rows
            in all, an unknown variance_reduction.

    Source: Bardes et al. 2022, arXiv:2105.04906, eq. 1-6; scaling as vicreg@4e12602.
    """
    if z.shape != z_prime.shape or z.ndim != 2:
        raise ValueError(
            "z and z_prime must both have shape (rows, dimensions), got "
            f"{tuple(z.shape)} and {tuple(z_prime.shape)}."
        )
    if not (z.is_floating_point() and z_prime.is_floating_point()):
        raise ValueError(
            f"embeddings must be floating point, got {z.dtype} and {z_prime.dtype}; "
            "convert them with .float()."
        )
    if len(z) * world_size(group) < 2:
        raise ValueError(
            f"variance needs at least 2 rows over all processes, got {len(z)}; use a larger batch."
        )
    if variance_reduction not in ("mean", "sum"):
        raise ValueError(f"variance_reduction must be mean or sum, got {variance_reduction!r}.")
    branch_weight = 0.5 if variance_reduction == "mean" else 1.0
    coefficients = (sim_coeff, std_coeff, cov_coeff)
    return VICRegTerms(*_VICReg.apply(z, z_prime, coefficients, gamma, eps, branch_weight, group))


class VICRegLoss(nn.Module):
    """`vicreg_loss` as a module; see there for the arguments."""

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
        self.gamma, self.eps = gamma, eps
        self.variance_reduction: VarianceReduction = variance_reduction
        self.group = group

    def forward(self, z: Tensor, z_prime: Tensor) -> VICRegTerms:
        return vicreg_loss(
            z,
            z_prime,
            sim_coeff=self.sim_coeff,
            std_coeff=self.std_coeff,
            cov_coeff=self.cov_coeff,
            gamma=self.gamma,
            eps=self.eps,
            variance_reduction=self.variance_reduction,
            group=self.group,
        )
