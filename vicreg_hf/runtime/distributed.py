"""Sums, gathered rows, flags and failures that several processes share.

Without an initialised process group everything here is the single-process case.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor
from torch.distributed.tensor import DTensor

ProcessGroup = dist.ProcessGroup | None
T = TypeVar("T")
PATIENCE = timedelta(hours=12)
"""How long processes wait for the main one while it prepares data, computes features or pushes.
Within a step they wait as long as their backend does by default, ten minutes with NCCL."""
_patient: list[Any] = []
"""The group over which long work is waited for, if there is one; else the default group."""
_of_norms: list[tuple[weakref.ref[Any], str]] = []
"""At most one pair: a default group, and the name of the group that batch normalisation has beside
it. The name is of no use once another group is the default one."""


def be_patient() -> None:
    """Make the group over which processes wait for long work; every process must call this."""
    _patient.clear()
    if world_size() > 1:
        _patient.append(dist.new_group(backend="gloo", timeout=PATIENCE))


def patient_group() -> ProcessGroup:
    return _patient[0] if _patient and world_size() > 1 else None


def open_norm_group() -> None:
    """Make a group for batch normalisation, once; every process must call this.

    In the default group its messages, which the next layer waits for, would queue behind gradients.
    """
    if world_size() > 1 and not norm_group_name():
        own: Any = dist.new_group()
        _of_norms[:] = [(weakref.ref(dist.group.WORLD), own.group_name)]


@torch.compiler.assume_constant_result
def norm_group_name() -> str:
    """Name of the group that `open_norm_group` has made; else empty, for the default group."""
    alive = world_size() > 1 and _of_norms and _of_norms[0][0]() is dist.group.WORLD
    return _of_norms[0][1] if alive else ""


def wait_for_all() -> None:
    """Wait until every process is here, as long as one may take for long work."""
    if world_size() > 1:
        dist.barrier(group=patient_group())


def gather_objects(own: list[T]) -> list[T]:
    """The lists of all processes, one after the other in rank order; it may wait for long work.

    Args:
        own: anything that pickles; it comes from processes of this run alone.
    """
    if world_size() == 1:
        return own
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, own, group=patient_group())
    return [each for part in found for each in part]


@contextmanager
def main_process_first() -> Iterator[None]:
    """Let the main process go through a context before the others enter it."""
    if rank() > 0:
        wait_for_all()
    yield
    if rank() == 0:
        wait_for_all()


def world_size(group: ProcessGroup = None) -> int:
    """Processes in the group; 1 when torch.distributed is not in use."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: ProcessGroup = None) -> int:
    """This process's place in the group; 0 when torch.distributed is not in use."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def find_group(name: str) -> ProcessGroup:
    """The process group of a `group_name`; the empty name means the default group."""
    return c10d._resolve_process_group(cast(Any, name)) if name else None


_compared: ContextVar[bool] = ContextVar("compared", default=False)


@contextmanager
def shapes_compared(compared: bool = True) -> Iterator[None]:
    """Skip `check_same_shape`, which waits for the device, where it would only be repeated."""
    token = _compared.set(compared)
    try:
        yield
    finally:
        _compared.reset(token)


def check_same_shape(x: Tensor, group: ProcessGroup = None, *, counts: Sequence[int] = ()) -> None:
    """Fail in every process, rather than hang, where the shape of x differs between them.

    Args:
        counts: further integers that must be equal, such as the number of tensors of that shape.

    Raises:
        ValueError: shapes or counts that differ.
    """
    if world_size(group) == 1 or _compared.get():
        return
    own = torch.tensor([[*counts, *x.shape]], device=x.device)
    found = [tuple(row) for row in gather_rows(own, group).tolist()]
    if any(row != found[0] for row in found):
        alike = all(row[: len(counts)] == found[0][: len(counts)] for row in found)
        received = ", ".join(str(row[len(counts) :] if alike else row) for row in found)
        raise ValueError(
            "every process must hold embeddings of the same shape, got "
            f"{received}; drop or pad the last batch."
        )


def sum_over_processes(x: Tensor, group: ProcessGroup = None) -> Tensor:
    """Sum x over the group, in place, without a gradient."""
    if world_size(group) > 1:
        dist.all_reduce(x, group=group)
    return x


def own_part(x: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds; any other tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def norms_of(
    tensors: Sequence[Tensor], *, sharded: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """The norm of each tensor: (tensors,).

    Args:
        sharded: the tensors are parts, each process's own; then every process must call this.
    """
    norms = torch.stack(torch._foreach_norm(list(tensors), dtype=dtype))
    return sum_over_processes(norms.square()).sqrt() if sharded else norms


class Vote:
    """Flags on their way from all processes, for which `read` waits; a GPU goes on meanwhile.

    Every process must make one.

    Args:
        flags: this process's, as booleans or as scalar tensors on the device.
    """

    def __init__(
        self,
        flags: Sequence[bool | Tensor],
        device: torch.device,
        group: ProcessGroup = None,
    ) -> None:
        votes = [
            flag.to(torch.float32)
            if isinstance(flag, Tensor)
            else torch.full((), float(flag), device=device)
            for flag in flags
        ]
        self._counts = sum_over_processes(torch.stack(votes), group)
        self._arrived: torch.cuda.Event | None = None
        if device.type == "cuda":
            on_host = torch.empty(len(flags), pin_memory=True)
            self._counts = on_host.copy_(self._counts, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(device))

    def read(self) -> list[bool]:
        """Whether each flag is set in any process."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [count > 0 for count in self._counts.tolist()]


def any_process(flags: Sequence[bool | Tensor], device: torch.device) -> list[bool]:
    """Whether each flag is set in any process. Waits for the device once."""
    return Vote(flags, device).read()


def agree(*flags: bool) -> list[bool]:
    """Whether each flag is set in any process; it may wait for long work, and never for a GPU."""
    if world_size() == 1:
        return list(flags)
    return Vote(flags, torch.device("cpu"), patient_group()).read()


def gather_rows(x: Tensor, group: ProcessGroup = None) -> Tensor:
    """Concatenate the rows of all processes in rank order, without a gradient.

    Args:
        x: (B, ...), the same shape in every process.

    Returns:
        (B * world size, ...).
    """
    size = world_size(group)
    if size == 1:
        return x
    rows = x.new_empty(size * len(x), *x.shape[1:])
    # newer versions of torch have the same under another name
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    gather(rows, x.contiguous(), group=group)
    return rows


def share_out(count: int, block: int) -> list[range]:
    """Rows of each process: successive whole blocks, so that each block is computed as by one."""
    size, blocks = world_size(), -(-count // block)
    edges = [min(count, blocks * part // size * block) for part in range(size + 1)]
    return [range(*pair) for pair in pairwise(edges)]


def gather_shares(x: Tensor, shares: Sequence[range]) -> Tensor:
    """Concatenate the rows of all processes, of which each has as many as its share.

    Args:
        x: (rows, ...), of one shape in every process but for the number of rows.
        shares: as `share_out` gives them.
    """
    if world_size() == 1:
        return x
    most = max(map(len, shares))
    padded = x.new_zeros(most, *x.shape[1:])
    padded[: len(x)] = x
    parts = gather_rows(padded).split(most)
    return torch.cat([part[: len(own)] for part, own in zip(parts, shares, strict=True)])


# torch.compile takes each of these as one node of a graph, which does not end there; what such a
# node returns must not be what it was given.


@torch.library.custom_op("vicreg_hf::gather_in", mutates_args=())
def _gather_op(x: Tensor, group_name: str) -> Tensor:
    rows = gather_rows(x, find_group(group_name))
    return rows.clone() if rows is x else rows


@torch.library.custom_op("vicreg_hf::sum_in", mutates_args=())
def _sum_op(x: Tensor, group_name: str) -> Tensor:
    return sum_over_processes(x.clone(), find_group(group_name))


@_gather_op.register_fake
def _(x: Tensor, group_name: str) -> Tensor:
    return x.new_empty(world_size(find_group(group_name)) * len(x), *x.shape[1:])


@_sum_op.register_fake
def _(x: Tensor, _: str) -> Tensor:
    return torch.empty_like(x)


def gather_in(x: Tensor, group_name: str) -> Tensor:
    """`gather_rows` in the group of a name, also inside compiled graphs."""
    if torch.compiler.is_compiling():
        return _gather_op(x, group_name)
    return gather_rows(x, find_group(group_name))


def sum_in(x: Tensor, group_name: str) -> Tensor:
    """`sum_over_processes` in the group of a name, also inside compiled graphs.

    Use only the sum that is returned: x becomes it too, but in compiled graphs it stays as it was.
    """
    if torch.compiler.is_compiling():
        return _sum_op(x, group_name)
    return sum_over_processes(x, find_group(group_name))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group, ctx.count = group, len(x)
        return gather_rows(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = sum_over_processes(grads[0].clone(), ctx.group)
        start = rank(ctx.group) * ctx.count
        return total[start : start + ctx.count], None


def gather_with_gradient(x: Tensor, group: ProcessGroup = None) -> Tensor:
    """Concatenate the rows of all processes in rank order, for a loss that compares rows.

    The gradient of a row is the sum of those of all processes. So where each computes the same loss
    of all rows, or its own part of a mean, DistributedDataParallel's averaging gives the gradient
    of one process that holds every row.

    Args:
        x: (B, ...), the same shape in every process.

    Returns:
        (B * world size, ...); on one process x itself.
    """
    return x if world_size(group) == 1 else cast(Tensor, _GatherRows.apply(x, group))


class OtherProcessFailed(RuntimeError):  # noqa: N818
    """Another process of the run has failed."""


@contextmanager
def failing_together(device: torch.device) -> Iterator[None]:
    """Raise in every process where one does, or the others would wait for it.

    They wait for long work, up to `PATIENCE`.

    Every process must enter, and nothing inside may wait for other processes.

    Raises:
        OtherProcessFailed: in the processes that did not fail themselves.
    """
    fault: Exception | None = None
    try:
        yield
    except Exception as error:  # raised again below, once all processes know
        fault = error
    group = patient_group()
    vote = Vote([fault is not None], torch.device("cpu") if group else device, group)
    if vote.read()[0]:
        raise fault or OtherProcessFailed("another process has failed; its own message says why.")
