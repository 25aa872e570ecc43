"""The covariance term and its gradient, in whichever of two equal forms is cheaper.

Shapes: n rows in this process, N in all, D dimensions, K = min(LEADING, D).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vicreg_hf.runtime.distributed import ProcessGroup, rank, sum_over_processes

BLOCK_ELEMENTS = {"cpu": 2**20}
"""Entries of a gradient formed at once; on other devices than these 2**21."""

STRIPE_ROWS = {"cpu": 256}
"""Rows of a symmetric product formed at once; on other devices than these 2048."""

LEADING = 8
"""Dimensions of largest variance that the Gram form treats apart, see `_gram`."""


class Branch(NamedTuple):
    """One branch's statistics over all processes, and the product that its gradient needs."""

    mean: Tensor
    """(D,)"""
    variance: Tensor
    """(D,): unbiased."""
    product: Tensor
    """Gram form: (n, N), this process's rows of X X^T / (N - 1), without the leading dimensions;
    otherwise (D, D), the covariance matrix with a diagonal of zeros; empty where not asked for."""
    leading: Tensor
    """(K,): indices of the dimensions of largest variance; empty in the covariance form."""
    cross: Tensor
    """(K, D): covariances of the leading dimensions with all; empty in the covariance form."""


class Gradient(NamedTuple):
    """Weights of what is added up to the gradient of a branch."""

    covariance: float
    """Of X (product): everything in front of the sum over dimensions."""
    columns: Tensor
    """(D,): of X, by dimension; the variance term's."""
    difference: float
    """Of this branch minus the other."""
    total: Tensor
    """Scalar, of all of it: the gradient of the loss itself."""


def compute_dtype(z: Tensor) -> torch.dtype:
    """The precision that embeddings are computed in: float32, for float64 itself."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def prefers_gram(num_rows: int, dim: int) -> bool:
    """Whether the Gram form of N rows costs less than the covariance form."""
    return num_rows < dim


def analyse(
    rows: Tensor, n: int, total: int, group: ProcessGroup, *, product: bool = True
) -> tuple[Branch, Tensor]:
    """Statistics of a branch and this process's share of its covariance term.

    Args:
        rows: Gram form: (N, D) of all processes; otherwise this process's (n, D).
        product: form it; without it the variance alone is computed, and that share is zero.
    """
    if not product:
        return _spread(rows, total, group)
    form = _gram if prefers_gram(total, rows.shape[1]) else _covariance
    return form(rows, n, total, group)


def allocate(like: Tensor, n: int, total: int, dim: int, *, product: bool = True) -> Branch:
    """What `analyse` gives, without values."""
    gram, num_leading = product and prefers_gram(total, dim), min(LEADING, dim)
    return Branch(
        mean=like.new_empty(dim),
        variance=like.new_empty(dim),
        product=like.new_empty(((n, total) if gram else (dim, dim)) if product else 0),
        leading=like.new_empty(num_leading if gram else 0, dtype=torch.long),
        cross=like.new_empty((num_leading, dim) if gram else 0),
    )


def _gram(rows: Tensor, n: int, total: int, group: ProcessGroup) -> tuple[Branch, Tensor]:
    """Form this process's rows of the Gram matrix.

    That matrix also holds the variances, which are then taken off. This loses digits where few
    dimensions hold nearly all the variance, so the `LEADING` ones are set apart: their covariances
    with all dimensions are formed directly, and the Gram matrix is that of the others.
    """
    dim = rows.shape[1]
    mean = rows.mean(0, dtype=compute_dtype(rows))
    x = (rows - mean).contiguous()
    variance = sum_of_squares(x, 0) / (total - 1)
    leading = variance.topk(min(LEADING, dim)).indices
    cross = (x[:, leading].T @ x).div_(total - 1)
    cross.scatter_(1, leading[:, None], 0)
    x.index_fill_(1, leading, 0)
    own = x[_own(n, group)]
    product = _symmetric_product(x) if n == total else own @ x.T
    product.div_(total - 1)
    among = cross[:, leading].square().sum()
    others = variance.index_fill(0, leading, 0).square().sum()
    # Every process holds the same of these: one of the W shares.
    share = (2 * sum_of_squares(cross) - among - others) * (n / total)
    squares = share + sum_of_squares(product)
    return Branch(mean, variance, product, leading, cross), squares / dim


def _covariance(rows: Tensor, n: int, total: int, group: ProcessGroup) -> tuple[Branch, Tensor]:
    """Form the covariance matrix."""
    dim = rows.shape[1]
    mean = sum_over_processes(rows.sum(0, dtype=compute_dtype(rows)), group) / total
    x = (rows - mean).contiguous()
    product = sum_over_processes(_symmetric_product(x.T), group).div_(total - 1)
    variance = product.diagonal().clone()
    product.fill_diagonal_(0)
    squares = sum_of_squares(product) / dim * (n / total)
    empty = product.new_empty(0)
    return Branch(mean, variance, product, empty.long(), empty), squares


def _spread(rows: Tensor, total: int, group: ProcessGroup) -> tuple[Branch, Tensor]:
    """Mean and variance of this process's rows (n, D) and all others'."""
    mean = sum_over_processes(rows.sum(0, dtype=compute_dtype(rows)), group) / total
    variance = sum_over_processes(sum_of_squares(rows - mean, 0), group) / (total - 1)
    empty = mean.new_empty(0)
    return Branch(mean, variance, empty, empty.long(), empty.clone()), mean.new_zeros(())


def differentiate(
    branch: Branch, rows: Tensor, z: Tensor, other: Tensor, weights: Gradient, group: ProcessGroup
) -> Tensor:
    """The gradient (n, D) of a branch z; `rows` are what `analyse` was given."""
    x = (rows - branch.mean).contiguous()
    n, dim = z.shape
    # Where X is this process's alone, its memory becomes that of the gradient.
    grad = x if len(x) == n and x.dtype == z.dtype else z.new_empty(z.shape)
    if len(branch.leading):
        _through_gram(branch, x, x[_own(n, group)], grad, z, other, weights)
    else:
        for start in range(0, n, step := _block_length(x, dim)):
            part = slice(start, start + step)
            out = _local_part(x[part], z[part], other[part], weights.columns, weights)
            if branch.product.numel():
                out.addmm_(x[part], branch.product, alpha=weights.covariance)
            grad[part] = _scaled(out, weights.total, z.dtype)
    return grad


def _through_gram(
    branch: Branch, x: Tensor, own: Tensor, grad: Tensor, z: Tensor, other: Tensor, by: Gradient
) -> None:
    """Fill grad by blocks of columns, each of which needs only its own columns of X."""
    leading, cross = branch.leading, branch.cross
    top = own[:, leading]
    out = _local_part(top, z[:, leading], other[:, leading], by.columns[leading], by)
    top_grad = _scaled(out.addmm_(own, cross.T, alpha=by.covariance), by.total, z.dtype)
    x.index_fill_(1, leading, 0)
    columns = by.columns - by.covariance * branch.variance
    for start in range(0, z.shape[1], step := _block_length(x, len(z))):
        part = (slice(None), slice(start, start + step))
        out = _local_part(own[part], z[part], other[part], columns[part[1]], by)
        out.addmm_(branch.product, x[part], alpha=by.covariance)
        out.addmm_(top, cross[part], alpha=by.covariance)
        grad[part] = _scaled(out, by.total, z.dtype)
    grad[:, leading] = top_grad.to(grad.dtype)


def _local_part(x: Tensor, z: Tensor, other: Tensor, columns: Tensor, by: Gradient) -> Tensor:
    """What a block's own entries add to their gradient: invariance and variance."""
    difference = z.to(x.dtype) - other.to(x.dtype)
    return difference.mul_(by.difference).addcmul_(x, columns)


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale a gradient; in float16 stop at its largest value, unless a loss scale goes beyond."""
    grad.mul_(scale)
    if dtype == torch.float16:
        limit = torch.finfo(dtype).max * scale.abs().clamp(min=1)
        grad.clamp_(-limit, limit)
    return grad


def _symmetric_product(x: Tensor) -> Tensor:
    """Form x @ x.T; of blocks that mirror each other only one is computed."""
    product = x.new_empty(len(x), len(x))
    for start in range(0, len(x), step := STRIPE_ROWS.get(x.device.type, 2048)):
        stop = min(start + step, len(x))
        torch.mm(x[start:stop], x[start:].T, out=product[start:stop, start:])
        product[stop:, start:stop] = product[start:stop, stop:].T
    return product


def sum_of_squares(x: Tensor, dim: int | None = None) -> Tensor:
    """Sum the squares of (rows, columns) by blocks of rows.

    On CPU `torch.linalg.vector_norm` loses four digits of float32 at 10^7 entries.
    """
    return torch.stack([rows.square().sum(dim) for rows in in_blocks(x)]).sum(0)


def in_blocks(x: Tensor) -> tuple[Tensor, ...]:
    """Views of successive rows of x."""
    return x.split(_block_length(x, x.shape[1]))


def _block_length(x: Tensor, width: int) -> int:
    """How many rows of some width make a block on x's device."""
    return max(1, BLOCK_ELEMENTS.get(x.device.type, 2**21) // width)


def _own(n: int, group: ProcessGroup) -> slice:
    """This process's rows among all."""
    start = rank(group) * n
    return slice(start, start + n)
