"""What several processes must agree on: sums, gathered rows, and batch statistics with gradients.

Without an initialised process group everything here is the single-process case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

ProcessGroup = dist.ProcessGroup | None


def world_size(group: ProcessGroup = None) -> int:
    """Processes in the group; 1 when torch.distributed is not in use."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: ProcessGroup = None) -> int:
    """This process's place in the group; 0 when torch.distributed is not in use."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def find_group(name: str) -> ProcessGroup:
    """The process group of a `group_name`; the empty name is the default group's."""
    return c10d._resolve_process_group(cast(Any, name)) if name else None


_compared: ContextVar[bool] = ContextVar("compared", default=False)


@contextmanager
def shapes_compared(compared: bool = True) -> Iterator[None]:
    """Spare `check_same_shape`, which waits for the device, where it would only be repeated."""
    token = _compared.set(compared)
    try:
        yield
    finally:
        _compared.reset(token)


def check_same_shape(x: Tensor, group: ProcessGroup = None, *, counts: Sequence[int] = ()) -> None:
    """Fail in every process, rather than hang, where x has not the same shape in all.

    Args:
        counts: further whole numbers that must be alike, such as how many tensors of that shape.

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


class Vote:
    """Flags that are being gathered from all processes; `read` waits until they are here.

    A GPU goes on meanwhile: nothing but `read` waits for it. Every process must make one.

    Args:
        flags: scalars, booleans of this process or tensors on the device.
    """

    def __init__(
        self, flags: Sequence[bool | Tensor], device: torch.device, group: ProcessGroup = None
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
        """Each flag: whether it is set in any process."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [count > 0 for count in self._counts.tolist()]


def any_process(
    flags: Sequence[bool | Tensor], device: torch.device, group: ProcessGroup = None
) -> list[bool]:
    """Each flag: whether it is set in any process. Waits for the device once."""
    return Vote(flags, device, group).read()


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
    # the same by its newer name, where torch has it
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    gather(rows, x.contiguous(), group=group)
    return rows


class OtherProcessFailed(RuntimeError):  # noqa: N818
    """What another process of the run raised."""


@contextmanager
def failing_together(device: torch.device) -> Iterator[None]:
    """Raise in every process where one does, or the others would wait for it.

    Every process must enter, and nothing inside may wait for other processes.

    Raises:
        OtherProcessFailed: in the processes that did not fail themselves.
    """
    fault: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is
        fault = error
    if any_process([fault is not None], device)[0]:
        raise fault or OtherProcessFailed("another process has failed; its own message says why.")


class _Sum(torch.autograd.Function):
    """The sum over processes; the gradient of a sum is the sum of the gradients."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return sum_over_processes(x.clone())

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return sum_over_processes(grad.clone(memory_format=torch.contiguous_format))


def differentiable_sum(x: Tensor) -> Tensor:
    """Sum x over all processes, with the gradient of every process's result."""
    return cast(Tensor, _Sum.apply(x))


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation over the rows of all processes, on any device.

    torch's own raises on CPU. Statistics and gradients equal those of one process that holds every
    row. It also carries the activation and dropout that timm fuses into its BatchNormAct2d.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            normal = F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        else:
            normal = self._normalise(x)
        return self.act(self.drop(normal))

    def _normalise(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.ndim - 2)
        dims = [d for d in range(x.ndim) if d != 1]
        dtype = x.dtype
        x = x.float() if dtype in (torch.float16, torch.bfloat16) else x
        count = x.new_tensor([x.numel() // x.shape[1]])
        # Two reductions, centred before squaring: sums of squares cancel in float32.
        total = differentiable_sum(torch.cat([x.sum(dims), count]))
        rows, mean = total[-1], total[:-1] / total[-1]
        centred = x - mean.view(shape)
        variance = differentiable_sum(centred.square().sum(dims)) / rows
        self._update_running(mean.detach(), variance.detach(), rows.detach())
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        normal = centred * scale.view(shape)
        if self.bias is not None:
            normal = normal + self.bias.view(shape)
        return normal.to(dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor, rows: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1.0 / self.num_batches_tracked if self.momentum is None else self.momentum
        unbiased = variance * (rows / (rows - 1))
        self.running_mean += share * (mean - self.running_mean)
        self.running_var += share * (unbiased - self.running_var)

    @classmethod
    def convert(cls, module: nn.Module) -> nn.Module:
        """Replace every batch normalisation inside module; names and state stay the same."""
        if isinstance(module, _BatchNorm) and not isinstance(module, cls):
            return cls._from(module)
        for name, child in module.named_children():
            converted = cls.convert(child)
            if converted is not child:
                module.register_module(name, converted)
        return module

    @classmethod
    def _from(cls, norm: _BatchNorm) -> SyncBatchNorm:
        new = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        if isinstance(norm, BatchNormAct2d):
            new.drop, new.act = norm.drop, norm.act  # pyright: ignore[reportAttributeAccessIssue]
        new.weight, new.bias = norm.weight, norm.bias
        new.running_mean, new.running_var = norm.running_mean, norm.running_var
        new.num_batches_tracked = norm.num_batches_tracked
        return new.train(norm.training)
