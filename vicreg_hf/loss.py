"""The VICReg loss: global statistics, float32 throughout, its own backward pass.

Shapes: n rows in this process, N = n * world size rows in all, D embedding dimensions.

With X the centred (N, D) embeddings, the sum of squares of X^T X (D, D) equals that of X X^T
(N, N). So the covariance term has two exact forms, and the cheaper one is taken:

    Gram, when N < D:         each process forms its own rows of X X^T
    covariance, otherwise:    each process adds its rows' share of X^T X

With that product a process has all that its own gradient needs: backward communicates nothing.
`vicreg_hf.covariance` holds the two forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vicreg_hf import covariance
from vicreg_hf.covariance import Branch, Gradient
from vicreg_hf.distributed import (
    ProcessGroup,
    check_same_shape,
    find_group,
    gather_rows,
    sum_over_processes,
    world_size,
)

VarianceReduction = Literal["mean", "sum"]


class VICRegTerms(NamedTuple):
    """The loss and its three unweighted terms; only `loss` carries a gradient."""

    loss: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor


class Settings(NamedTuple):
    """What `vicreg_loss` takes, as numbers; branch_weight is 1/2 for the mean over branches."""

    sim: float
    std: float
    cov: float
    gamma: float
    eps: float
    branch_weight: float


def _forward(
    z: Tensor, z_prime: Tensor, settings: Sequence[float], group_name: str
) -> list[Tensor]:
    """The four of `VICRegTerms`, the gathered rows (empty if none are), and two `Branch`es."""
    by, group = Settings(*settings), find_group(group_name)
    check_same_shape(z, group)
    (n, dim), processes = z.shape, world_size(group)
    total = count_rows(n, group)
    with torch.autocast(z.device.type, enabled=False):
        gathered = z.new_empty(0)
        if processes > 1 and covariance.prefers_gram(total, dim):
            gathered = gather_rows(torch.stack((z, z_prime), 1), group)
        first, second = (
            covariance.analyse(rows, n, total, group) for rows in rows_of((z, z_prime), gathered)
        )
        sums = torch.stack([squared_distance(z, z_prime), first[1] + second[1]])
        distance, squares = sum_over_processes(sums, group)
        invariance, squares = distance / (total * dim), squares.clone()
        hinges = [
            hinge(branch, by)[0].mean() * by.branch_weight for branch in (first[0], second[0])
        ]
        variance = hinges[0] + hinges[1]
        loss = by.sim * invariance + by.std * variance + by.cov * squares
    return [loss, invariance, variance, squares, gathered, *first[0], *second[0]]


def _backward(
    grad: Tensor,
    z: Tensor,
    z_prime: Tensor,
    saved: list[Tensor],
    needed: Sequence[bool],
    settings: Sequence[float],
    group_name: str,
) -> list[Tensor]:
    """Gradients of both branches, from what `_forward` returned; empty where not needed.

    `saved` is emptied, so that a branch's product is gone when its gradient is there.
    """
    by, group = Settings(*settings), find_group(group_name)
    gathered, branches = saved[0], [Branch(*saved[6:]), Branch(*saved[1:6])]
    saved.clear()
    (n, dim), processes = z.shape, world_size(group)
    total = n * processes
    grads = []
    with torch.autocast(z.device.type, enabled=False):
        for index, rows in enumerate(rows_of((z, z_prime), gathered)):
            branch = branches.pop()
            if not needed[index]:
                grads.append(z.new_empty(0))
                continue
            own, other = (z, z_prime) if index == 0 else (z_prime, z)
            # DDP averages over processes; what is global must survive that.
            weights = weigh(branch, by, total, 2 * by.sim / (total * dim), grad * processes)
            grads.append(covariance.differentiate(branch, rows, own, other, weights, group))
    return grads


def count_rows(n: int, group: ProcessGroup) -> int:
    """The rows of all processes; fewer than two are refused."""
    total = n * world_size(group)
    if total < 2:
        raise ValueError(
            f"variance needs at least 2 rows over all processes, got {total}; use a larger batch."
        )
    return total


def rows_of(branches: Sequence[Tensor], gathered: Tensor) -> Sequence[Tensor]:
    """What each branch's product is formed of: all processes' rows if gathered, else the own."""
    return gathered.unbind(1) if gathered.numel() else branches


def squared_distance(z: Tensor, z_prime: Tensor) -> Tensor:
    """Sum of the squared differences, by blocks."""
    blocks = zip(covariance.in_blocks(z), covariance.in_blocks(z_prime), strict=True)
    dtype = covariance.compute_dtype(z)
    return torch.stack([(a.to(dtype) - b.to(dtype)).square_().sum() for a, b in blocks]).sum()


def hinge(branch: Branch, by: Settings) -> tuple[Tensor, Tensor]:
    """What each dimension's standard deviation lacks, and that deviation."""
    deviation = (branch.variance + by.eps).sqrt()
    return (by.gamma - deviation).clamp(min=0), deviation


def weigh(
    branch: Branch, by: Settings, total: int, difference: float, total_grad: Tensor
) -> Gradient:
    """The weights of a branch's gradient, where all processes hold `total` rows."""
    lacking, deviation = hinge(branch, by)
    pairs = (total - 1) * len(deviation)
    slope = by.std * by.branch_weight / pairs
    return Gradient(
        covariance=4 * by.cov / pairs,
        columns=(lacking > 0) / deviation * -slope,
        difference=difference,
        total=total_grad,
    )


# torch.compile takes each as one node: nothing to trace, and the same arithmetic as without it.
_forward_op = torch.library.custom_op("vicreg_hf::loss_forward", _forward, mutates_args=())
_backward_op = torch.library.custom_op("vicreg_hf::loss_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(z: Tensor, _: Tensor, __: Sequence[float], group_name: str) -> list[Tensor]:
    (n, dim), processes = z.shape, world_size(find_group(group_name))
    gram = covariance.prefers_gram(n * processes, dim)
    gathered = z.new_empty((n * processes, 2, dim) if gram and processes > 1 else 0)
    x = z.new_empty(0, dtype=covariance.compute_dtype(z))
    branches = [covariance.allocate(x, n, n * processes, dim) for _ in range(2)]
    return [*(x.new_empty(()) for _ in range(4)), gathered, *branches[0], *branches[1]]


@_backward_op.register_fake
def _(_: Tensor, z: Tensor, __: Tensor, ___: Any, needed: Sequence[bool], *____: Any) -> Any:
    return [z.new_empty(z.shape if wanted else 0) for wanted in needed]


class _VICReg(torch.autograd.Function):
    """`_forward` and `_backward` as one differentiable function."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, z_prime: Tensor, settings: Sequence[float], group_name: str
    ) -> tuple[Tensor, ...]:
        run = _forward_op if torch.compiler.is_compiling() else _forward
        loss, invariance, variance, covariance, *saved = run(z, z_prime, settings, group_name)
        ctx.save_for_backward(z, z_prime, *saved)
        ctx.settings, ctx.group_name = settings, group_name
        ctx.mark_non_differentiable(invariance, variance, covariance)
        return loss, invariance, variance, covariance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        compiling = torch.compiler.is_compiling()  # which refuses second derivatives itself
        if torch.is_grad_enabled() and not compiling:
            raise RuntimeError(
                "vicreg_loss has no second derivative; call backward without create_graph=True."
            )
        run = _backward_op if compiling else _backward
        z, z_prime, *saved = ctx.saved_tensors
        if not compiling:
            ctx.maybe_clear_saved_tensors()  # unless the graph is retained
        needed = ctx.needs_input_grad[:2]
        result = run(grads[0], z, z_prime, saved, needed, ctx.settings, ctx.group_name)
        both = (g if wanted else None for g, wanted in zip(result, needed, strict=True))
        return (*both, None, None)


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
        variance_reduction: "mean" averages the variance term over the two branches, as the
            authors' code; "sum" adds them, as the paper's pseudo-code.
        group: the processes that share the batch; None is the default group.

    Returns:
        Scalars loss, invariance, variance and covariance, the same in every process. The terms are
        detached and not weighted.

    Raises:
        ValueError: shapes that differ, also between processes, or are not (n, D), integer
            embeddings, fewer than two rows in all, an unknown variance_reduction.

    Source: Bardes et al. 2022, arXiv:2105.04906, eq. 1-6; scaling as vicreg@4e12602.
    """
    if z.shape != z_prime.shape or z.ndim != 2:
        raise ValueError(
            "z and z_prime must both have shape (rows, dimensions), got "
            f"{tuple(z.shape)} and {tuple(z_prime.shape)}."
        )
    check_floating_point(z, z_prime)
    branch_weight = find_branch_weight(variance_reduction)
    settings = list(Settings(sim_coeff, std_coeff, cov_coeff, gamma, eps, branch_weight))
    name = "" if group is None else group.group_name
    dtype = torch.promote_types(z.dtype, z_prime.dtype)
    return VICRegTerms(*_VICReg.apply(z.to(dtype), z_prime.to(dtype), settings, name))


def check_floating_point(*branches: Tensor) -> None:
    """Refuse integer embeddings."""
    if not all(z.is_floating_point() for z in branches):
        received = " and ".join(str(z.dtype) for z in branches)
        raise ValueError(
            f"embeddings must be floating point, got {received}; convert them with .float()."
        )


def find_branch_weight(variance_reduction: VarianceReduction) -> float:
    """What each of two branches counts in the variance term."""
    if variance_reduction not in ("mean", "sum"):
        raise ValueError(f"variance_reduction must be mean or sum, got {variance_reduction!r}.")
    return 0.5 if variance_reduction == "mean" else 1.0


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
