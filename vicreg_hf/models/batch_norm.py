"""Batch normalisation over the rows of all processes, where torch has none: on CPU."""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from vicreg_hf.runtime.distributed import gather_rows, sum_over_processes


def synchronize(module: nn.Module, device: torch.device) -> nn.Module:
    """Let every batch normalisation inside module count the rows of all processes.

    Names and state stay the same. On CUDA it is torch's own, which is fused and for CUDA alone.
    """
    return (convert_sync_batchnorm if device.type == "cuda" else SyncBatchNorm.convert)(module)


def count_once(module: nn.Module) -> list[RemovableHandle]:
    """Have running statistics count no batch again whose forward pass a backward pass repeats."""
    handles = []
    for part in module.modules():
        if isinstance(part, _BatchNorm) and part.track_running_stats:
            handles.append(part.register_forward_pre_hook(_pause))
            # also where the repeated pass is broken off, as nothing more is needed of it
            handles.append(part.register_forward_hook(_go_on, always_call=True))
    return handles


def _pause(part: Any, _: Any) -> None:
    # in a backward pass; where it does not train, as a frozen one, it counts nothing
    if part.training and torch._C._current_graph_task_id() >= 0:
        part._paused, part.momentum = [part.momentum], 0.0  # no other tensors than before


def _go_on(part: Any, *_: Any) -> None:
    if paused := part.__dict__.pop("_paused", None):
        (part.momentum,) = paused
        with torch.no_grad():
            part.num_batches_tracked.sub_(1)


class _Normalize(torch.autograd.Function):
    """x, of all processes' rows zero mean and unit variance, times weight plus bias.

    It sends one message forward, the means, variances and counts of each process, and one backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance, rows = _statistics(x)
        ctx.save_for_backward(x, weight, mean, variance, rows)
        ctx.eps = eps
        normal = F.batch_norm(x, mean, variance, weight, bias, eps=eps)
        ctx.mark_non_differentiable(mean, variance, rows)
        return normal, mean, variance, rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, rows = ctx.saved_tensors
        # as if the statistics were constants ...
        grad, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            grads[0], x, weight, mean, variance, None, None, False, ctx.eps, [True] * 3
        )
        # ... less what changing them would undo, which depends on all rows
        slope, offset = sum_over_processes(torch.stack([of_weight, of_bias])) / rows
        scale = weight * (variance + ctx.eps).rsqrt()
        grad -= F.batch_norm(x, mean, variance, scale * slope, scale * offset, eps=ctx.eps)
        return grad, of_weight, of_bias, None


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance (C,) of all processes' rows, and their number, a scalar.

    Each process centres its own before squaring, as sums of squares would cancel in float32; Chan,
    Golub and LeVeque, 1979.
    """
    count = x.new_full((1,), x.numel() // x.shape[1])
    mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
    parts = gather_rows(torch.cat([mean, variance, count])[None])
    means, variances = parts[:, :-1].chunk(2, dim=1)
    share = parts[:, -1:] / parts[:, -1].sum()
    mean = (share * means).sum(0)
    variance = (share * (variances + (means - mean).square())).sum(0)
    return mean, variance, parts[:, -1].sum()


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation over the rows of all processes, on any device.

    torch's own raises on CPU. Statistics and gradients equal those of one process that holds every
    row; every process must hold at least one. It also calls the dropout and activation that timm
    fuses into its BatchNormAct2d.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            normal = F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        else:
            normal = self._normalize(x)
        for name in ("drop", "act"):
            if hasattr(self, name):
                normal = getattr(self, name)(normal)
        return normal

    @torch.compiler.disable()  # pyright: ignore[reportCallIssue, reportArgumentType]
    def _normalize(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.float() if dtype in (torch.float16, torch.bfloat16) else x
        weight = x.new_ones(x.shape[1]) if self.weight is None else self.weight.to(x.dtype)
        bias = x.new_zeros(x.shape[1]) if self.bias is None else self.bias.to(x.dtype)
        normal, mean, variance, rows = cast(
            tuple[Tensor, ...], _Normalize.apply(x, weight, bias, self.eps)
        )
        self._update_running(mean, variance, rows)
        return normal.to(dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor, rows: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1.0 / self.num_batches_tracked if self.momentum is None else self.momentum
        unbiased = variance * (rows / (rows - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)

    @classmethod
    def convert(cls, module: nn.Module) -> nn.Module:
        """Make every batch normalisation inside module one of these; its state stays as it is."""
        for part in module.modules():
            if isinstance(part, _BatchNorm):
                part.__class__ = cls
        return module
