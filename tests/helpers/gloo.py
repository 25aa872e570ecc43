"""Processes that tests share; every call forms a fresh gloo group among them."""

from __future__ import annotations

import os
import pickle
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from warm import context

MAX_PROCESSES = 4
TIMEOUT = timedelta(minutes=3)
"""That a rank waits for others, whose processes may be starting on a busy machine."""


class GlooPool:
    """Runs a function in several processes at once, as the ranks of one gloo group."""

    def __init__(self) -> None:
        self.pool = ProcessPoolExecutor(MAX_PROCESSES, context(), _prepare)

    def run(self, num_processes: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(*args)` returns on every rank, in rank order.

        Args:
            num_processes: at most `MAX_PROCESSES`.
            function: at the top level of a module; it may use torch.distributed.
            *args: anything that pickles; tensors are better made from a seed on the other side.
        """
        with tempfile.TemporaryDirectory() as folder:
            group = {"init_method": f"file://{folder}/store", "world_size": num_processes}
            # Each has a process of its own, as none ends before all have met at the barrier.
            futures = [
                self.pool.submit(_as_rank, group | {"rank": rank}, function, args)
                for rank in range(num_processes)
            ]
            # Where one rank fails the others wait for it in vain: every error is shown.
            errors = [error for f in futures if (error := f.exception()) is not None]
        if errors:
            raise BaseExceptionGroup(f"{len(errors)} of {num_processes} ranks failed", errors)
        return [pickle.loads(future.result()) for future in futures]

    def close(self) -> None:
        self.pool.shutdown()


def _prepare() -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("error")


def _as_rank(group: dict[str, Any], function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    try:
        dist.init_process_group("gloo", timeout=TIMEOUT, **group)
        dist.barrier()  # a rank that leaves at once would fail those still connecting
        # By value: torch would otherwise send tensors as handles that die with the worker.
        return pickle.dumps(function(*args))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
