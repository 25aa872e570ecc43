"""The covariance term and its gradient, in whichever of two equal forms is cheaper.

Shapes: n rows in this process, N in all, D dimensions, K = min(LEADING, D).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vicreg_hf.runtime.distributed import ProcessGroup, rank, sum_over_processes

BLOCK_ELEMENTS = {"cpu": 2**20}
"""Entries of a gradient that are computed at once; 2**21 on devices that are not listed."""

STRIPE_ROWS = {"cpu": 256}
"""Rows of a symmetric product that are computed at once; 2048 on devices that are not listed."""

LEADING = 8
"""Number of dimensions of largest variance that the Gram form treats apart, see `_gram`."""


class ViewStatistics(NamedTuple):
    """A view's statistics over all processes, and the product that its gradient needs."""

    mean: Tensor
    """(D,)"""
    variance: Tensor
    """(D,): unbiased."""
    product: Tensor
    """Gram form: (n, N), this process's rows of X X^T / (N - 1), without the leading dimensions;
    otherwise (D, D), the covariance matrix with a diagonal of zeros; empty without the term."""
    leading: Tensor
    """(K,): indices of the dimensions of largest variance; empty in the covariance form."""
    cross: Tensor
    """(K, D): covariances of the leading dimensions with all; empty in the covariance form."""


class GradientWeights(NamedTuple):
    """The factors of the parts that add up to the gradient of a view."""

    covariance: float
    """Factor of X (product): all that stands in front of the sum over dimensions."""
    columns: Tensor
    """(D,): factor of each column of X, of the variance term."""
    difference: float
    """Factor of this view minus its partners' mean, of the invariance term."""
    total: Tensor
    """Scalar: the gradient of the loss itself, a factor of the whole."""


def compute_dtype(z: Tensor) -> torch.dtype:
    """Choose the dtype of the arithmetic: float64 for float64 embeddings, otherwise float32."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def prefers_gram(num_rows: int, dim: int) -> bool:
    """Say whether the Gram form of N rows costs less than the covariance form."""
    return num_rows < dim


def analyse(
    rows: Tensor, n: int, total: int, group: ProcessGroup, *, product: bool = True
) -> tuple[ViewStatistics, Tensor]:
    """Compute a view's statistics and this process's share of its covariance term.

    Args:
        rows: in the Gram form (N, D) of all processes; otherwise (n, D) of this process.
        product: False computes the mean and the variance alone, and that share is zero.
    """
    if product and prefers_gram(total, rows.shape[1]):
        return _gram(rows, n, total, group)
    mean = sum_over_processes(rows.sum(0, dtype=compute_dtype(rows)), group) / total
    empty = mean.new_empty(0)
    if not product:
        variance = sum_over_processes(sum_of_squares(rows - mean, 0), group) / (total - 1)
        statistics = ViewStatistics(mean, variance, empty, empty.long(), empty.clone())
        return statistics, mean.new_zeros(())
    x = (rows - mean).contiguous()
    matrix = sum_over_processes(_symmetric_product(x.T), group).div_(total - 1)
    variance = matrix.diagonal().clone()
    matrix.fill_diagonal_(0)
    squares = sum_of_squares(matrix) / rows.shape[1] * (n / total)
    return ViewStatistics(mean, variance, matrix, empty.long(), empty), squares


def allocate(like: Tensor, n: int, total: int, dim: int, *, product: bool = True) -> ViewStatistics:
    """Allocate tensors of the shapes that `analyse` returns, without values."""
    gram, num_leading = product and prefers_gram(total, dim), min(LEADING, dim)
    return ViewStatistics(
        mean=like.new_empty(dim),
        variance=like.new_empty(dim),
        product=like.new_empty(((n, total) if gram else (dim, dim)) if product else 0),
        leading=like.new_empty(num_leading if gram else 0, dtype=torch.long),
        cross=like.new_empty((num_leading, dim) if gram else 0),
    )


def _gram(rows: Tensor, n: int, total: int, group: ProcessGroup) -> tuple[ViewStatistics, Tensor]:
    """Form this process's rows of the Gram matrix.

    That matrix also holds the variances, which are then subtracted. This loses digits where few
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
    # Every process holds the same values of these, and counts one of the W shares.
    share = (2 * sum_of_squares(cross) - among - others) * (n / total)
    squares = share + sum_of_squares(product)
    return ViewStatistics(mean, variance, product, leading, cross), squares / dim


def differentiate(
    stats: ViewStatistics, rows: Tensor, z: Tensor, other: Tensor, by: GradientWeights,
    group: ProcessGroup,
) -> Tensor:  # fmt: skip
    """Compute the gradient (n, D) of a view z from the `rows` that `analyse` took.

    Args:
        other: (n, D): the mean of the views that z is compared with.
    """
    x = (rows - stats.mean).contiguous()
    n, dim = z.shape
    # Where X is this process's alone, its memory becomes that of the gradient.
    grad = x if len(x) == n and x.dtype == z.dtype else z.new_empty(z.shape)
    if len(stats.leading):
        _differentiate_gram(stats, x, x[_own(n, group)], grad, z, other, by)
    else:
        for start in range(0, n, step := block_length(x, dim)):
            part = slice(start, start + step)
            out = _local_part(x[part], z[part], other[part], by.columns, by)
            if stats.product.numel():
                out.addmm_(x[part], stats.product, alpha=by.covariance)
            grad[part] = _scaled(out, by.total, z.dtype)
    return grad


def _differentiate_gram(
    stats: ViewStatistics, x: Tensor, own: Tensor, grad: Tensor, z: Tensor, other: Tensor,
    by: GradientWeights,
) -> None:  # fmt: skip
    """Fill grad by blocks of columns, each of which needs only its own columns of X."""
    leading, cross = stats.leading, stats.cross
    top = own[:, leading]
    out = _local_part(top, z[:, leading], other[:, leading], by.columns[leading], by)
    top_grad = _scaled(out.addmm_(own, cross.T, alpha=by.covariance), by.total, z.dtype)
    x.index_fill_(1, leading, 0)
    columns = by.columns - by.covariance * stats.variance
    for start in range(0, z.shape[1], step := block_length(x, len(z))):
        part = (slice(None), slice(start, start + step))
        out = _local_part(own[part], z[part], other[part], columns[part[1]], by)
        out.addmm_(stats.product, x[part], alpha=by.covariance)
        out.addmm_(top, cross[part], alpha=by.covariance)
        grad[part] = _scaled(out, by.total, z.dtype)
    grad[:, leading] = top_grad.to(grad.dtype)


def _local_part(
    x: Tensor, z: Tensor, other: Tensor, columns: Tensor, by: GradientWeights
) -> Tensor:
    """Compute the part of a block's gradient that needs no other rows: invariance and variance."""
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
    """Split x into blocks of successive rows, without a copy."""
    return x.split(block_length(x, x.shape[1]))


def block_length(x: Tensor, width: int) -> int:
    """Count the rows of this width that make a block on x's device."""
    return max(1, BLOCK_ELEMENTS.get(x.device.type, 2**21) // width)


def _own(n: int, group: ProcessGroup) -> slice:
    """Find this process's rows among all."""
    start = rank(group) * n
    return slice(start, start + n)
