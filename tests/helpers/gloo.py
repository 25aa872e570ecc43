"""One pool of processes that tests share; every call forms a fresh gloo group among them."""

from __future__ import annotations

import os
import pickle
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

MAX_PROCESSES = 4
TIMEOUT = timedelta(minutes=3)
"""That a rank waits for others, whose processes may be starting on a busy machine."""


class GlooPool:
    """Runs a function in several processes at once, as the ranks of one gloo group."""

    def __init__(self) -> None:
        # An executor for each rank, so that no process can be given two of them.
        self.ranks = [
            ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_prepare)
            for _ in range(MAX_PROCESSES)
        ]

    def run(self, num_processes: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(*args)` returns on every rank, in rank order.

        Args:
            num_processes: at most `MAX_PROCESSES`.
            function: at the top level of a module; it may use torch.distributed.
            *args: anything that pickles; tensors are better made from a seed on the other side.
        """
        assert num_processes <= MAX_PROCESSES
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            futures = [
                executor.submit(_as_rank, rank, num_processes, store, function, args)
                for rank, executor in enumerate(self.ranks[:num_processes])
            ]
            # Where one rank fails the others wait for it in vain: every error is shown.
            errors = [error for f in futures if (error := f.exception()) is not None]
        if errors:
            raise BaseExceptionGroup(f"{len(errors)} of {num_processes} ranks failed", errors)
        return [pickle.loads(future.result()) for future in futures]

    def close(self) -> None:
        for executor in self.ranks:
            executor.shutdown()


def _prepare() -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("error")


def _as_rank(
    rank: int, num_processes: int, store: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> bytes:
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=num_processes,
            timeout=TIMEOUT,
        )
        dist.barrier()  # a rank that leaves at once would fail those still connecting
        # By value: torch would otherwise send tensors as handles that die with the worker.
        return pickle.dumps(function(*args))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
