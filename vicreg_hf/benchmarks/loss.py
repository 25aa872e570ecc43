"""The loss against the authors' formula and lightly's, in one process and over several.

Shapes: n rows in this process, N in all, D dimensions.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import statistics
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vicreg_hf.benchmarks.measuring import (
    MIB,
    median_seconds,
    memory_process,
    peak_extra_mib,
    seconds_of,
    surroundings,
    table,
)
from vicreg_hf.loss.vicreg import vicreg_loss
from vicreg_hf.runtime.distributed import gather_rows, rank, world_size
from vicreg_hf.runtime.machine import available_cores

Loss = Callable[[Tensor, Tensor], Tensor]


class _FullGather(torch.autograd.Function):
    """All rows of all processes; its gradient sums over all of them, as the authors' does."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return gather_rows(x)

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(world_size())[rank()]


def authors_loss(z: Tensor, z_prime: Tensor) -> Tensor:
    """The authors' formula, written plainly, with their coefficients; scalar.

    Source: vicreg@4e12602, main_vicreg.py, VICReg.forward.
    """
    invariance = F.mse_loss(z, z_prime)
    variance, covariance = z.new_zeros(()), z.new_zeros(())
    for branch in (z, z_prime):
        x = _FullGather.apply(branch) if world_size() > 1 else branch
        num_rows, dim = x.shape
        x = x - x.mean(dim=0)
        deviation = torch.sqrt(x.var(dim=0) + 0.0001)
        variance = variance + F.relu(1 - deviation).mean() / 2
        matrix = (x.T @ x) / (num_rows - 1)
        off_diagonal = matrix.flatten()[1:].view(dim - 1, dim + 1)[:, :-1].flatten()
        covariance = covariance + off_diagonal.pow_(2).sum() / dim
    return 25 * invariance + 25 * variance + covariance


def our_loss(z: Tensor, z_prime: Tensor) -> Tensor:
    """`vicreg_loss`, the total alone."""
    return vicreg_loss(z, z_prime).loss


def losses() -> dict[str, Loss]:
    """The losses that are compared; lightly's is among them where it is installed."""
    found: dict[str, Loss] = {"vicreg_hf": our_loss, "authors": authors_loss}
    try:
        from lightly.loss import VICRegLoss as LightlyLoss  # pyright: ignore[reportMissingImports]
    except ImportError:
        return found
    return found | {"lightly": LightlyLoss()}


def embeddings(n: int, dim: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Two branches that agree in part, as in training."""
    generator = torch.Generator().manual_seed(rank())
    z, noise = torch.randn(2, n, dim, generator=generator)
    return [x.to(device, dtype).requires_grad_() for x in (z, 0.7 * z + 0.7 * noise)]


def forward_backward(loss: Loss, inputs: Sequence[Tensor]) -> Callable[[], object]:
    """One step of a loss, as a function without arguments."""
    return lambda: torch.autograd.grad(loss(*inputs), inputs)


def losses_compared(
    *,
    rows: Sequence[int],
    dims: Sequence[int],
    dtype: str,
    device: str,
    processes: Sequence[int] | None,
    memory: bool = True,
) -> str:
    """A table over the grid, in one process or over several on CPU; dtype is torch's name.

    Args:
        memory: measure it too, of one process.
    """
    place, kind = torch.device("cpu" if processes else device), getattr(torch, dtype)
    if processes:
        lines = _several_processes(processes, rows, dims, kind)
    else:
        lines = _one_process(rows, dims, place, kind, memory=memory)
    return f"{surroundings(place)}\n{lines}"


def _one_process(
    rows: Sequence[int],
    dims: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    memory: bool,
) -> str:
    """A table over the grid: time and peak memory of forward and backward."""
    alternatives, lines = losses(), []
    apart = memory and device.type == "cpu"  # torch counts by itself what lies on a GPU
    with memory_process() if apart else contextlib.nullcontext() as pool:
        for n, dim in itertools.product(rows, dims):
            inputs = embeddings(n, dim, device, dtype)
            runs = {name: forward_backward(loss, inputs) for name, loss in alternatives.items()}
            seconds = median_seconds(runs, device)
            settings = (n, dim, device, dtype)
            extra: dict[str, float | None] = dict.fromkeys(runs)
            for name in runs if memory else ():
                given = (name, *settings)
                extra[name] = pool.submit(_memory, *given).result() if pool else _memory(*given)
            lines.append([str(n), str(dim), *_figures(seconds, extra)])
            print(" ".join(lines[-1]), file=sys.stderr, flush=True)
    others = list(alternatives)[1:]
    ratios = [f"{name} / ours" for name in others]
    return table(["N", "D", "ms", *ratios, "extra MiB", *ratios], lines)


def _memory(name: str, n: int, dim: int, device: torch.device, dtype: torch.dtype) -> float | None:
    run = forward_backward(losses()[name], embeddings(n, dim, device, dtype))
    if n * dim <= 2**24:
        run()  # the buffers that a library keeps are not counted
    return peak_extra_mib(run, device)


def _figures(seconds: dict[str, float], memory: dict[str, float | None]) -> list[str]:
    """Ours, and the others as multiples of it: first of the time, then of the memory."""
    ours, *others = seconds.values()
    figures = [f"{1000 * ours:.1f}", *(f"{other / ours:.2f}" for other in others)]
    ours, *others = memory.values()
    figures.append("?" if ours is None else f"{ours:.0f}")
    return [*figures, *(f"{other / ours:.1f}" if other and ours else "?" for other in others)]


def _addmm_flop(_: Any, a: Sequence[int], b: Sequence[int], **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


TCPI_BYTES_SENT = 200
"""Where the kernel's struct tcp_info (linux/tcp.h) has the count, since Linux 4.19."""

IN_PLACE_FLOPS = {torch.ops.aten.addmm_: _addmm_flop}
"""Operations that torch's counter leaves out, with what counts them."""


def _several_processes(
    processes: Sequence[int], rows: Sequence[int], dims: Sequence[int], dtype: torch.dtype
) -> str:
    """A table of global batches over CPU processes: arithmetic, bytes sent and time of each.

    Bytes are those of gloo's TCP connections, as Linux counts them.
    """
    lines: list[list[str]] = []
    for num_rows, dim, world in itertools.product(rows, dims, processes):
        with tempfile.TemporaryDirectory() as folder:
            settings = (world, f"{folder}/store", num_rows, dim, dtype, f"{folder}/lines")
            mp.spawn(_worker, settings, nprocs=world)
            lines += json.loads(Path(f"{folder}/lines").read_text())
    header = ["N", "D", "processes", "loss", "GFLOP per process", "MiB sent per process", "ms"]
    return table(header, lines)


def _worker(
    number: int, world: int, store: str, num_rows: int, dim: int, dtype: torch.dtype, output: str
) -> None:
    repeats = 3
    torch.set_num_threads(max(1, available_cores() // world))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=world)
    inputs = embeddings(num_rows // world, dim, torch.device("cpu"), dtype)
    lines = []
    for name, loss in (("vicreg_hf", our_loss), ("authors", authors_loss)):
        run = forward_backward(loss, inputs)
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE_FLOPS) as counter:
            run()
        times, before = [], _bytes_sent()
        for _ in range(repeats):
            dist.barrier()
            times.append(seconds_of(run, inputs[0].device))
        dist.barrier()
        own = torch.tensor(_bytes_sent() - before)
        dist.all_reduce(own)
        sent = own.item() / repeats / world / MIB
        flops = counter.get_total_flops() / 1e9
        milliseconds = 1000 * statistics.median(times)
        place = [str(num_rows), str(dim), str(world)]
        lines.append([*place, name, f"{flops:.1f}", f"{sent:.1f}", f"{milliseconds:.0f}"])
    if number == 0:
        Path(output).write_text(json.dumps(lines))
    dist.destroy_process_group()


def _bytes_sent() -> int:
    """Over all TCP connections of this process that are open."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as connection:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            total += struct.unpack_from("=Q", info, TCPI_BYTES_SENT)[0]
    return total
