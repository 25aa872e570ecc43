"""Batch normalisation over the rows of all processes, on any device, also in compiled graphs.

Shapes: B samples of this process, C channels, W processes. The rows of x (B, C, ...) are its
entries of one channel.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from vicreg_hf.runtime.distributed import gather_in, norm_group_name, open_norm_group, sum_in


def synchronize(module: nn.Module) -> nn.Module:
    """Let every batch normalisation inside module count the rows of all processes.

    Names and state stay the same. Every process must call this.
    """
    open_norm_group()
    return SyncBatchNorm.convert(module)


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


class _Portable:
    """Stand-ins, under their names, for operators that torch has for CUDA alone.

    They serve CPUs, and on any device the compiler, which fuses them with what is around them.
    """

    @staticmethod
    def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Mean (C,) of a process's rows, and the inverse (C,) of their deviation."""
        x = _at_least_single(x)
        if torch.compiler.is_compiling():
            others = [dim for dim in range(x.ndim) if dim != 1]
            variance, mean = torch.var_mean(x, others, correction=0)
        else:
            mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        return mean, (variance + eps).rsqrt()

    @staticmethod
    def batch_norm_gather_stats_with_counts(
        _: Tensor,
        means: Tensor,
        invstds: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        counts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Mean and inverse deviation (C,) of all rows, from those of each process (W, C).

        Each process centres its own rows before squaring, as sums of squares would cancel in
        float32; Chan, Golub and LeVeque, 1979.
        """
        total = counts.sum()
        share = (counts / total)[:, None]
        mean = (share * means).sum(0)
        variance = (share * (invstds.pow(-2) - eps + (means - mean).square())).sum(0)
        if running_mean is not None and running_var is not None:
            unbiased = variance * (total / (total - 1))
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        return mean, (variance + eps).rsqrt()

    @staticmethod
    def batch_norm_elemt(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        _: float,
    ) -> Tensor:
        """Rows with zero mean and unit variance, times weight plus bias."""
        scale = invstd if weight is None else invstd * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        return _affine(x, scale, shift).to(x.dtype)

    @staticmethod
    def batch_norm_backward_reduce(
        grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, *_: Any
    ) -> tuple[Tensor, ...]:
        """Sums of grad and of grad (x - mean), and the gradients of weight and bias; (C,) each."""
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            _at_least_single(grad), _at_least_single(x), None, None, None, mean, invstd, True, 0.0,
            [False, True, True],
        )  # fmt: skip
        return of_bias, of_weight / invstd, of_weight, of_bias

    @staticmethod
    def batch_norm_backward_elemt(
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        sum_grad: Tensor,
        sum_grad_x: Tensor,
        counts: Tensor,
    ) -> Tensor:
        """Gradient of x, through mean and deviation too, from the sums of all processes."""
        scale = invstd if weight is None else invstd * weight
        slope = -scale * invstd.square() * sum_grad_x / counts.sum()
        shift = -scale * sum_grad / counts.sum() - slope * mean
        through = _affine(x, slope, shift)
        return through.addcmul_(_at_least_single(grad), _across(scale, x)).to(x.dtype)


def _at_least_single(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _across(values: Tensor, x: Tensor) -> Tensor:
    """(C,) values as they are broadcast over x."""
    return values.view(1, -1, *[1] * (x.ndim - 2))


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """X times scale (C,) plus shift (C,), in one pass."""
    return torch.addcmul(_across(shift, x), _at_least_single(x), _across(scale, x))


def _operators(x: Tensor) -> Any:
    """The five operators: torch's fused ones for CUDA, unless they are compiled."""
    return torch if x.is_cuda and not torch.compiler.is_compiling() else _Portable


def _dense(x: Tensor) -> Tensor:
    """X in a layout for which the fused operators are made."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x if x.is_contiguous(memory_format=torch.channels_last_3d) else x.contiguous()


class _Normalize(torch.autograd.Function):
    """Normalise by statistics of all processes' rows, through which the gradient goes too.

    It sends one message, backward, and never waits for a GPU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        counts: Tensor,
        eps: float,
        group_name: str,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, invstd, counts)
        ctx.group_name = group_name
        return _operators(x).batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "synchronised batch normalisation has no second derivative; call backward without "
                "create_graph=True."
            )
        x, weight, mean, invstd, counts = ctx.saved_tensors
        grad, needed, operators = _dense(grads[0]), ctx.needs_input_grad[:3], _operators(x)
        *sums, of_weight, of_bias = operators.batch_norm_backward_reduce(
            grad, x, mean, invstd, weight, *needed
        )
        of_x = None
        if needed[0]:
            of_all = sum_in(torch.cat(sums), ctx.group_name).chunk(2)
            weight = None if weight is None else weight.to(mean.dtype)
            of_x = operators.batch_norm_backward_elemt(
                grad, x, mean, invstd, weight, *of_all, counts
            )
        found = zip((of_x, of_weight, of_bias), needed, strict=True)
        return (*(each if wanted else None for each, wanted in found), *[None] * 5)


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation over the rows of all processes, on any device.

    torch's own raises on CPU, waits for a GPU three times a call, and ends compiled graphs; this
    one waits once a call, and ends graphs, only where momentum is None, for a cumulative average.
    In training, statistics and gradients equal those of one process that holds every row; every
    process must hold at least one. It also calls the dropout and activation that timm fuses into
    its BatchNormAct2d.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:  # each process by itself, as they may evaluate unequally often
            normal = F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias,
                training=self.running_mean is None, eps=self.eps,
            )  # fmt: skip
        else:
            x, group_name = _dense(x), norm_group_name()
            statistics = self._statistics(x, group_name)
            normal = cast(
                Tensor,
                _Normalize.apply(x, self.weight, self.bias, *statistics, self.eps, group_name),
            )
        for name in ("drop", "act"):
            if hasattr(self, name):
                normal = getattr(self, name)(normal)
        return normal

    @torch.no_grad()
    def _statistics(self, x: Tensor, group_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and inverse deviation (C,) of all processes' rows, and each one's number of them.

        They are sent in one message, and followed by the running statistics.
        """
        momentum = self.momentum
        if self.running_mean is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / self.num_batches_tracked.item()
        operators = _operators(x)
        mean, invstd = operators.batch_norm_stats(x, self.eps)
        count = mean.new_full((1,), x.numel() // x.shape[1])
        parts = gather_in(torch.cat([mean, invstd, count])[None], group_name)
        means, invstds, counts = parts.split([len(mean), len(mean), 1], dim=1)
        running = self.running_mean, self.running_var
        kind = counts.dtype if running[0] is None else running[0].dtype
        # CUDA's operator takes the type of counts from its first argument where nothing is running:
        # `means`, as x may be in half precision (pytorch issues 96203 and 98332)
        mean, invstd = operators.batch_norm_gather_stats_with_counts(
            means, means, invstds, *running, momentum or 0.0, self.eps, counts.flatten().to(kind)
        )
        return mean, invstd, counts.flatten().to(torch.int32)

    @classmethod
    def convert(cls, module: nn.Module) -> nn.Module:
        """Make every batch normalisation inside module one of these; its state stays as it is."""
        for part in module.modules():
            if isinstance(part, _BatchNorm):
                part.__class__ = cls
        return module
