"""The local loss: VICReg's criterion on matched cells of two feature maps of the same images.

Shapes: n images in this process, N = n * world size in all, P cells of a map of h rows and w
columns, D embedding dimensions of a cell, K pairs of cells that are kept of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicreg_hf.loss import covariance
from vicreg_hf.loss.autograd import Settings
from vicreg_hf.loss.checks import VarianceReduction, check_coefficients, check_embeddings
from vicreg_hf.runtime.checks import is_whole
from vicreg_hf.runtime.distributed import (
    ProcessGroup,
    check_same_shape,
    find_group,
    sum_over_processes,
    world_size,
)

PAIR_ELEMENTS = {"cpu": 2**22}
"""Entries of matched cells, and of their covariance matrices, that are computed at once; 2**25 on
devices that are not listed. One pair of each image is always computed with all others."""


class LocalTerms(NamedTuple):
    """The local loss and its two parts; only `loss` carries a gradient."""

    loss: Tensor
    """The sum of both parts."""
    location: Tensor
    """The criterion of cells that lie close together in the image, in both directions."""
    feature: Tensor
    """The criterion of cells whose embeddings are close, in both directions."""


def local_loss(
    z: Tensor,
    z_prime: Tensor,
    places: Tensor,
    places_prime: Tensor,
    *,
    matches: int = 20,
    sim_coeff: float = 25.0,
    std_coeff: float = 25.0,
    cov_coeff: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
    variance_reduction: VarianceReduction = "mean",
    group: ProcessGroup = None,
) -> LocalTerms:
    """VICRegL's local loss of the maps of two views, over all processes.

    Every cell is matched twice with a cell of the other map: with the one whose centre is nearest
    in the whole image, in pixels (location), and with the one whose embedding is nearest (feature),
    both by the l2 distance. Of either, the K pairs of each image with the smallest distance are
    kept, nearest first; of cells as near as each other the first by rows is. So are the matches of
    the second map's cells with the first's. The loss is the sum of the four.

    The paper sums its criterion l(z_p, z'_NN(p)) over the pairs, l being the loss of two batches
    of vectors. It is read here so: the k-th best pairs of all N images are two batches of N rows,
    which have the invariance, variance and covariance of `vicreg_loss`, and of the K values the
    mean is taken, so that the weight of this loss keeps its meaning whatever K is. Cells of one
    image are never compared with each other.

    Computed in float32 whatever the autocast (in float64 for float64 input). The gradient is
    computed with the loss, and is scaled for an average over processes as that of `vicreg_loss`.
    The choice of pairs has none, and there is no second derivative: create_graph=True raises.

    Peak memory of forward and backward, gradients included: two float32 copies of both maps, three
    of maps of lower precision; and in turn, in numbers of float32, distances and copies of points,
    3 `covariance.BLOCK_ELEMENTS` or those of one image, P x P' and (P + P') D, and pairs,
    6 `PAIR_ELEMENTS` or those of one pair of each image, 2 D^2 + 10 n D.

    Args:
        z: (n, h, w, D) embeddings of the cells of the first views, the same shape in every process.
        z_prime: (n, h', w', D) of the second views; h' and w' may be others.
        places: (n, 5): top, left, height and width of each first view in pixels of the whole image,
            and 1 where the view is mirrored left to right, otherwise 0.
        places_prime: (n, 5) of the second views.
        matches: K, the paper's gamma; of maps with fewer cells all are kept.
        sim_coeff: as in `vicreg_loss`; likewise std_coeff, cov_coeff, gamma, eps and
            variance_reduction.
        group: the processes that share the batch; None is the default group.

    Returns:
        Scalars loss, location and feature, the same in every process; the last two are detached.

    Raises:
        ValueError: maps that are not (n, h, w, D) of the same n and D, also between processes, or
            have no cells, places that are not (n, 5), fewer than two images in all, a number of
            matches below 1, and as `vicreg_loss`.

    Source: Bardes, Ponce, LeCun 2022, "VICRegL", arXiv:2210.01571, section 3.2, after its text
    alone.
    """
    check_coefficients(
        variance_reduction=variance_reduction, sim_coeff=sim_coeff, std_coeff=std_coeff,
        cov_coeff=cov_coeff, gamma=gamma, eps=eps,
    )  # fmt: skip
    if not is_whole(matches) or matches < 1:
        raise ValueError(f"matches must be a whole number of at least 1, got {matches!r}.")
    _check_maps(z, z_prime, places, places_prime)
    check_same_shape(z, group, counts=z_prime.shape[1:3])
    total = len(z) * world_size(group)
    if total < 2:
        raise ValueError(
            f"variance needs at least 2 images over all processes, got {total}; use a larger batch."
        )
    dtype = torch.promote_types(z.dtype, z_prime.dtype)
    view_weight = 0.5 if variance_reduction == "mean" else 1.0
    settings = list(Settings(sim_coeff, std_coeff, cov_coeff, gamma, eps, view_weight))
    inputs = (z.to(dtype), z_prime.to(dtype), places, places_prime)
    rest = (matches, settings, "" if group is None else group.group_name)
    if torch.is_grad_enabled() and (z.requires_grad or z_prime.requires_grad):
        return LocalTerms(*_LocalLoss.apply(*inputs, *rest))
    run = _evaluate_op if torch.compiler.is_compiling() else _evaluate
    location, feature = run(*inputs, *rest, False)
    return LocalTerms(location + feature, location, feature)


def _check_maps(z: Any, z_prime: Any, places: Any, places_prime: Any) -> None:
    maps = (z, z_prime)
    rule = "z and z_prime must be maps (images, rows, columns, dimensions) with cells, and alike"
    if not all(isinstance(each, Tensor) for each in (*maps, places, places_prime)):
        raise ValueError(f"{rule}, as tensors; convert arrays with torch.as_tensor.")
    shapes = [tuple(each.shape) for each in maps]
    alike = all(each.ndim == 4 and each.numel() for each in maps)
    if not alike or len({(s[0], s[-1]) for s in shapes}) > 1:
        raise ValueError(f"{rule} in images and dimensions, got {shapes[0]} and {shapes[1]}.")
    check_embeddings(rule, *(each[:, 0, 0] for each in maps))
    for name, own in (("places", places), ("places_prime", places_prime)):
        if tuple(own.shape) != (len(z), 5):
            raise ValueError(
                f"{name} must hold top, left, height, width and mirrored of each of {len(z)} "
                f"images, got shape {tuple(own.shape)}."
            )


def _evaluate(
    z: Tensor,
    z_prime: Tensor,
    places: Tensor,
    places_prime: Tensor,
    matches: int,
    settings: Sequence[float],
    group_name: str,
    gradient: bool,
) -> list[Tensor]:
    """Compute location and feature part and, if asked for, the gradients of their sum by both maps.

    Args:
        settings: a `Settings`.
    """
    by, group, maps = Settings(*settings), find_group(group_name), (z, z_prime)
    dtype = covariance.compute_dtype(z)
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        cells = [each.to(dtype).flatten(1, 2) for each in maps]
        centres = [
            cell_centres(own.to(each.device, dtype), each.shape[1], each.shape[2])
            for own, each in zip((places, places_prime), maps, strict=True)
        ]
        grads = [torch.zeros_like(each) for each in cells] if gradient else []
        parts = []
        for points in (centres, cells):
            value = cells[0].new_zeros(())
            for source, (distances, nearest) in enumerate(_nearest(*points)):
                # a stable order, so that no tie is broken in another way elsewhere
                kept = distances.sort(dim=1, stable=True).indices[:, :matches]
                chosen = (kept, nearest.gather(1, kept))
                back = slice(None, None, -1 if source else 1)  # so that the map of `kept` is first
                value += _criterion(cells[back], chosen, by, group, grads[back])
            parts.append(value)
    return parts + [grad.view(each.shape) for grad, each in zip(grads, maps, strict=False)]


# torch.compile takes it as one node and traces nothing inside, so the arithmetic is the same.
_evaluate_op = torch.library.custom_op("vicreg_hf::local_loss", _evaluate, mutates_args=())


@_evaluate_op.register_fake
def _(z: Tensor, z_prime: Tensor, *rest: Any) -> list[Tensor]:
    like = z.new_empty(0, dtype=covariance.compute_dtype(z))
    grads = (z, z_prime) if rest[-1] else ()
    return [*(like.new_empty(()) for _ in range(2)), *(like.new_empty(x.shape) for x in grads)]


class _LocalLoss(torch.autograd.Function):
    """`_evaluate` as a differentiable function; it keeps nothing for backward but the gradients."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        run: Any = _evaluate_op if torch.compiler.is_compiling() else _evaluate
        location, feature, *grads = run(z, *rest, True)
        ctx.save_for_backward(*grads)
        ctx.dtype = z.dtype
        ctx.mark_non_differentiable(location, feature)
        return location + feature, location, feature

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # under torch.compile, which refuses second derivatives itself, it is always enabled
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the local loss has no second derivative; call backward without create_graph=True."
            )
        own = ((grads[0] * each).to(ctx.dtype) for each in ctx.saved_tensors)
        return (*own, None, None, None, None, None)


def cell_centres(places: Tensor, rows: int, columns: int) -> Tensor:
    """Compute where the centres of a map's cells lie in the whole image, in pixels.

    Args:
        places: (n, 5) of the views, as `local_loss` takes them.

    Returns:
        (n, rows * columns, 2): from the top and from the left, row by row.
    """
    top, left, height, width, mirrored = places[..., None].unbind(1)
    down, across = (
        (torch.arange(count, dtype=places.dtype, device=places.device) + 0.5) / count
        for count in (rows, columns)
    )
    across = torch.where(mirrored > 0, across.flip(0), across)
    y, x = top + height * down, left + width * across
    grid = (y[:, :, None].expand(-1, -1, columns), x[:, None, :].expand(-1, rows, -1))
    return torch.stack(grid, -1).flatten(1, 2)


def _nearest(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Find for each point of x the nearest of y, and the other way round, image by image.

    Args:
        x: (n, P, E) points of E coordinates.
        y: (n, P', E).

    Returns:
        Distances and indices, (n, P) each, for x; and (n, P') each for y.
    """
    # in the plane every distance is computed by itself, so that equal ones are equal bit for bit
    plane = x.shape[2] == 2
    mode = "donot_use_mm_for_euclid_dist" if plane else "use_mm_for_euclid_dist_if_necessary"
    found: tuple[list[Any], list[Any]] = ([], [])
    cells, others = x.shape[1], y.shape[1]
    # beside the distances, cdist keeps copies of the points
    at_once = covariance.block_length(x, max(cells * others, (cells + others) * (x.shape[2] + 2)))
    for own, other in zip(x.split(at_once), y.split(at_once), strict=True):
        distances = torch.cdist(own, other, compute_mode=mode)
        found[0].append(distances.min(2))
        found[1].append(distances.min(1))
    return [
        (torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts]))
        for parts in found
    ]


def _criterion(
    cells: Sequence[Tensor],
    chosen: tuple[Tensor, Tensor],
    by: Settings,
    group: ProcessGroup,
    grads: Sequence[Tensor],
) -> Tensor:
    """Compute VICReg's criterion of matched cells, and add its gradient to those of the maps.

    Args:
        cells: (n, P, D) of the map whose cells were matched, and of the other one.
        chosen: (n, K) indices of the cells of either, best pairs first.
        grads: of both maps, (n, P, D) each; empty where no gradient is wanted.

    Returns:
        Scalar: the mean over the K pairs, over all processes.
    """
    n, _, dim = cells[0].shape
    count, value = chosen[0].shape[1], cells[0].new_zeros(())
    limit = PAIR_ELEMENTS.get(cells[0].device.type, 2**25)
    step = max(1, limit // (2 * dim * max(n, dim)))
    for start in range(0, count, step):
        indices = [own[:, start : start + step, None].expand(-1, -1, dim) for own in chosen]
        pairs = [each.gather(1, own) for each, own in zip(cells, indices, strict=True)]
        part, pair_grads = _pairs(pairs, by, group, gradient=bool(grads))
        value += part / count
        for grad, own, new in zip(grads, indices, pair_grads, strict=False):
            for k in range(own.shape[1]):
                # one cell of each image at a time, as several may be matched with the same one
                grad.scatter_add_(1, own[:, k : k + 1], new[:, k : k + 1] / count)
    return value


def _pairs(
    pairs: Sequence[Tensor], by: Settings, group: ProcessGroup, *, gradient: bool
) -> tuple[Tensor, Sequence[Tensor]]:
    """Compute the criterion of k pairs of batches, and its gradient by both (n, k, D) of them.

    Returns:
        Scalar: the sum over the k pairs; and the gradients, if asked for.
    """
    n, k, dim = pairs[0].shape
    processes = world_size(group)
    total = n * processes
    x = torch.cat(list(pairs), 1).transpose(0, 1)  # (2 k, n, D)
    x = x - sum_over_processes(x.sum(1, keepdim=True), group) / total
    matrices = sum_over_processes(x.mT @ x, group).div_(total - 1)
    variance = matrices.diagonal(dim1=1, dim2=2).clone()
    matrices.diagonal(dim1=1, dim2=2).zero_()
    deviation = (variance + by.eps).sqrt()
    lacking = (by.gamma - deviation).clamp(min=0)
    difference = pairs[0] - pairs[1]
    distance = sum_over_processes(difference.square().sum(), group) / (total * dim)
    squares = covariance.sum_of_squares(matrices.flatten(0, 1)) / dim
    value = by.sim * distance + by.std * by.view_weight * lacking.sum() / dim + by.cov * squares
    if not gradient:
        return value, ()
    slope = by.std * by.view_weight * (lacking > 0) / deviation / -((total - 1) * dim)
    grad = torch.baddbmm(x * slope[:, None], x, matrices, alpha=4 * by.cov / ((total - 1) * dim))
    first, second = grad.transpose(0, 1).split(k, 1)
    difference *= 2 * by.sim / (total * dim)
    # DDP averages over processes; the global gradient must survive that.
    return value, [(first + difference) * processes, (second - difference) * processes]
